"""What benchmarks say on the screen: what was measured, on the standard output; what they are doing, beside it."""

import sys
import textwrap
from collections.abc import Iterator, Mapping

_WIDTH = 130


def show(name: str, figures: Mapping[str, object]) -> None:
    """Some figures of one thing that was measured, within the width of a line."""
    text = "  ".join(f"{key} {value}" for key, value in _flat(figures))
    print(textwrap.fill(f"{name}:  {text}", _WIDTH, subsequent_indent="    ", break_long_words=False), flush=True)


def say(text: str) -> None:
    """Something about the benchmark itself."""
    print(text, file=sys.stderr, flush=True)


def _flat(figures: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
