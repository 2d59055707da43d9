"""Draws the demo: streams side by side in a grid, and the page pool as a bar.

Knows nothing of gRPC or processes; it turns plain data into rich renderables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

COLORS = (
    *("white", "red", "cyan", "green", "yellow", "bright_blue"),
    *("magenta", "bright_cyan", "bright_yellow", "orange3", "bright_green", "orchid"),
)
MAX_COLUMNS = 4
PANEL_WIDTH, NARROW_PANEL_WIDTH = 36, 26
# What a panel's frame takes of its width and height.
FRAME_WIDTH, FRAME_HEIGHT = 4, 2


class Phase(Enum):
    """Where a stream is in its life."""

    SENT = "waiting"
    RUNNING = "speaking"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class StreamView:
    """One request as a person sees it; the demo fills it while the stream runs."""

    name: str
    detail: str
    text: str = ""
    num_tokens: int = 0
    phase: Phase = Phase.SENT


@dataclass(frozen=True, slots=True)
class PoolView:
    """Pages of the pool by use, and the batch that uses them."""

    num_pages: int
    page_bytes: int
    kv_pages: int
    adapter_pages: int
    idle_adapter_pages: int
    free_pages: int
    num_running: int
    num_waiting: int
    num_steps: int
    resident: tuple[str, ...]


def num_columns(num_streams: int, width: int, max_height: int | None) -> int:
    """Panels side by side: wide ones where they fit, narrow ones where wide ones would leave no lines for text."""
    columns = max(1, min(MAX_COLUMNS, width // PANEL_WIDTH))
    if max_height is not None and max_height // -(-num_streams // columns) < FRAME_HEIGHT + 3:
        columns = max(1, min(MAX_COLUMNS, width // NARROW_PANEL_WIDTH))
    return columns


def draw_grid(streams: Sequence[StreamView], width: int, max_height: int | None = None) -> RenderableType:
    """All streams. With a height limit each panel shows the end of its text, else all of it."""
    columns = num_columns(len(streams), width, max_height)
    panel_width = width // columns
    rows = [range(i, min(i + columns, len(streams))) for i in range(0, len(streams), columns)]
    grid = Table.grid(padding=0)
    for _ in range(columns):
        grid.add_column(width=panel_width)
    for row in rows:
        texts = [Text(streams[i].text.replace("\r", "")) for i in row]
        heights = [num_lines(text, panel_width - FRAME_WIDTH) for text in texts]
        height = max([*heights, 1]) + FRAME_HEIGHT if max_height is None else max(3, max_height // len(rows))
        grid.add_row(*(_draw_panel(streams[i], COLORS[i % len(COLORS)], panel_width, height) for i in row))
    return grid


def num_lines(text: Text, width: int) -> int:
    """Lines that a text takes when wrapped."""
    return len(_wrap(text, width))


def _wrap(text: Text, width: int) -> list[Text]:
    return list(text.wrap(Console(width=width, force_terminal=False), width))


def _draw_panel(stream: StreamView, color: str, width: int, height: int) -> Panel:
    lines = _wrap(Text(stream.text), width - FRAME_WIDTH)[-(height - FRAME_HEIGHT) :]
    body = Text("\n").join(lines)
    if stream.phase is Phase.RUNNING:
        body.append("▌", style="bold")
    body.stylize(color)
    title = Text.assemble((stream.name, f"bold {color}"), (f" {stream.detail}" if stream.detail else "", "dim"))
    title.truncate(width - 6, overflow="ellipsis")
    foot = stream.phase.value if stream.phase in (Phase.SENT, Phase.FAILED) else f"{stream.num_tokens} tokens"
    border = {Phase.SENT: "dim", Phase.RUNNING: color, Phase.DONE: f"dim {color}", Phase.FAILED: "bold red"}[stream.phase]
    return Panel(
        body,
        title=title,
        title_align="left",
        subtitle=Text(foot, "dim"),
        subtitle_align="right",
        border_style=border,
        box=box.ROUNDED,
        width=width,
        height=height,
    )


def pool_shares(pool: PoolView) -> list[tuple[str, int, str]]:
    """Label, pages and colour of each use of the pool, in the order drawn."""
    return [
        ("KV", pool.kv_pages, "bright_blue"),
        ("adapters in use", pool.adapter_pages - pool.idle_adapter_pages, "bright_yellow"),
        ("adapters cached", pool.idle_adapter_pages, "yellow4"),
        ("free", pool.free_pages, "grey37"),
    ]


def draw_pool(pool: PoolView, width: int) -> RenderableType:
    """The pool as one bar and its legend."""
    bar_width = max(10, min(width, 100))
    bar, legend, done, drawn = Text(), Text(), 0, 0
    for label, pages, color in pool_shares(pool):
        done += pages
        end = round(bar_width * done / max(1, pool.num_pages))
        bar.append(("░" if label == "free" else "█") * (end - drawn), style=color)
        legend.append("■ ", style=color).append(f"{label} {pages}   ")
        drawn = end
    head = Text.assemble(
        ("pool ", "dim"),
        f"{pool.num_pages} pages of {pool.page_bytes // 1024} KiB   ",
        ("batch ", "dim"),
        f"{pool.num_running} running, {pool.num_waiting} waiting   ",
        ("steps ", "dim"),
        f"{pool.num_steps}",
    )
    return Group(head, bar, legend)
