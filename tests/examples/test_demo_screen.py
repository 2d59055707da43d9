"""What the demo draws fits the terminal and tells the truth about the pool."""

import random

import pytest
from rich.console import Console, RenderableType

from examples.demo_corpus import VOICES, draw_topic
from examples.demo_screen import Phase, PoolView, StreamView, draw_grid, draw_pool, pool_shares

POOL = PoolView(
    num_pages=100,
    page_bytes=65536,
    kv_pages=40,
    adapter_pages=30,
    idle_adapter_pages=10,
    free_pages=30,
    num_running=3,
    num_waiting=2,
    num_steps=17,
    resident=(),
)


def render(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def views(phase: Phase) -> list[StreamView]:
    topic = draw_topic(random.Random(3))
    return [StreamView(name, "rank 8", tell(topic, random.Random(4)), 70, phase) for name, tell in VOICES.items()]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (120, 40), (200, 60), (60, 30)])
def test_live_grid_never_exceeds_its_height_or_width(width: int, height: int) -> None:
    streams = views(Phase.RUNNING)
    lines = render(draw_grid(streams, width, height), width)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert all(any(stream.name in line for line in lines) for stream in streams)


def test_finished_grid_holds_every_word_of_every_stream() -> None:
    streams = views(Phase.DONE)
    drawn = " ".join(render(draw_grid(streams, 120), 120))
    for stream in streams:
        assert all(word in drawn for word in stream.text.split())


def test_uses_of_the_pool_add_up_to_the_pool() -> None:
    assert sum(pages for _, pages, _ in pool_shares(POOL)) == POOL.num_pages


@pytest.mark.parametrize("width", [40, 80, 100])
def test_pool_bar_shows_free_pages_in_proportion(width: int) -> None:
    bar = render(draw_pool(POOL, width), width)
    drawn = next(line for line in bar if "░" in line)
    assert drawn.count("░") == pytest.approx(width * 0.3, abs=1)
    assert drawn.count("█") + drawn.count("░") == width
