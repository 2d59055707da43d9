"""Tables in Markdown, for the report. Knows no result."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column names, the others count."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(value: float | None, form: str) -> str:
    """A number in that form; nothing for what was not measured."""
    return "" if value is None else format(value, form)
