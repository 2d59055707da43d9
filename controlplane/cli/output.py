"""Where a command writes: tables and sentences for people, one JSON document per line for programs.

Knows nothing of the services; only that what they answer are protobuf messages.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

_PIPE_WIDTH = 1000

# What a terminal would act on rather than show; a model's text may hold any of it.
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class Output:
    """Answers go to standard output, everything about them (progress, summaries, errors) to standard error."""

    as_json: bool
    console: Console = field(default_factory=lambda: _console(is_stderr=False))
    errors: Console = field(default_factory=lambda: _console(is_stderr=True))

    def json(self, value: dict[str, Any]) -> None:
        """Writes one JSON document on a line of its own."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """Writes generated text as it comes, without letting it steer a terminal."""
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Says something about the answer to a person; programs do not get it."""
        if not self.as_json:
            self.errors.print(text, style="dim", markup=False)


def _console(is_stderr: bool) -> Console:
    stream = sys.stderr if is_stderr else sys.stdout
    # A pipe has no width: whole lines are easier to search than lines folded at 80.
    return Console(stderr=is_stderr, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


def printable(text: str) -> str:
    """The text with control characters spelled out, newlines and tabs kept."""
    return text.translate(_CONTROL)


def to_dict(message: Message) -> dict[str, Any]:
    """A message in protobuf's JSON form (64-bit numbers are strings, durations end in "s"), fields named as in the .proto."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def human_bytes(size_bytes: int) -> str:
    """A size with three significant digits: 812 B, 1.46 MiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def human_seconds(seconds: float) -> str:
    """A duration: 412 µs, 23 ms, 1.42 s, 3 min 5 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
