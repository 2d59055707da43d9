"""A trace: which requests arrive when, for which adapter, how long; and its form on disk, one JSON object a line.

    {"at_s": 0.25, "adapter": "pirate", "input_tokens": 120, "output_tokens": 64}
    {"at_s": 0.31, "adapter": null, "prompt_token_ids": [1, 450, 29], "output_tokens": 8}

`at_s` counts from the start of the replay and never falls from one line to the next. `adapter` is a name, a number (that
adapter of those the replay has at hand) or null for the base model. The prompt is given, or `input_tokens` says how long a
random one shall be. Empty lines are skipped. Knows nothing of who sends it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

FIELDS = ("at_s", "adapter", "input_tokens", "prompt_token_ids", "output_tokens")


class TraceError(ValueError):
    """A line that is no request of a trace; the message names file, line, field and value."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One arrival. prompt_token_ids: None for a random prompt of `input_tokens`."""

    at_s: float
    adapter: int | str | None
    input_tokens: int
    output_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None


def write_trace(path: Path, trace: Iterable[TraceRequest]) -> None:
    """Writes a trace; `read_trace` gives the same back."""
    with path.open("w", encoding="utf-8") as file:
        for request in trace:
            file.write(to_line(request) + "\n")


def to_line(request: TraceRequest) -> str:
    """One request as its line."""
    prompt: dict[str, object] = {"input_tokens": request.input_tokens}
    if request.prompt_token_ids is not None:
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
    return json.dumps({"at_s": request.at_s, "adapter": request.adapter, **prompt, "output_tokens": request.output_tokens})


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """Reads a trace.

    Raises:
        TraceError: a line is no request, or comes before the one above it.
    """
    trace: list[TraceRequest] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                request = _parse(line)
                if trace and request.at_s < trace[-1].at_s:
                    raise TraceError(f"at_s is {request.at_s:g}, earlier than the {trace[-1].at_s:g} of the request before")
            except TraceError as error:
                raise TraceError(f"{path}, line {number}: {error}") from None
            trace.append(request)
    if not trace:
        raise TraceError(f"{path} has no requests")
    return tuple(trace)


def _parse(line: str) -> TraceRequest:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TraceError(f"a request is a JSON object, not {line.strip()[:40]!r}")
    unknown = sorted(set(found) - set(FIELDS))
    if unknown:
        raise TraceError(f"unknown field {unknown[0]!r}; a request has {', '.join(FIELDS)}")
    if ("input_tokens" in found) == ("prompt_token_ids" in found):
        raise TraceError("exactly one of input_tokens and prompt_token_ids is needed")
    prompt = _token_ids(found["prompt_token_ids"]) if "prompt_token_ids" in found else None
    return TraceRequest(
        at_s=_seconds(found),
        adapter=_adapter(found.get("adapter")),
        input_tokens=_count(found, "input_tokens") if prompt is None else len(prompt),
        output_tokens=_count(found, "output_tokens"),
        prompt_token_ids=prompt,
    )


def _seconds(found: dict[str, Any]) -> float:
    value = found.get("at_s")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TraceError(f"at_s is {_shown(value)}; it must be a number of seconds, 0 or more")
    return float(value)


def _count(found: dict[str, Any], field: str) -> int:
    value = found.get(field)
    if not _is_whole(value) or value < 1:
        raise TraceError(f"{field} is {_shown(value)}; it must be a whole number, 1 or more")
    return value


def _adapter(value: Any) -> int | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if not _is_whole(value) or value < 0:
        raise TraceError(f"adapter is {_shown(value)}; it must be a name, a number from 0, or null for the base model")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_is_whole(item) and item >= 0 for item in value):
        raise TraceError(f"prompt_token_ids is {_shown(value)}; it must be a list of at least one token id")
    return tuple(value)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
