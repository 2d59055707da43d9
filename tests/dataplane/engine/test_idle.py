"""When the engine's thread waits for a message, and when it turns at once: idle, it takes no time of a processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dataplane.engine.engine import IDLE_CHECK_AFTER_S

if TYPE_CHECKING:
    from dataplane.engine.inbox import Message
    from tests.dataplane.conftest import Admit, EngineWorld, MakeWorld


IDLE = [IDLE_CHECK_AFTER_S, None, None]


def _turns(world: EngineWorld, num_turns: int, monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long each of so many turns would have waited for a message, if there had been none."""
    waits: list[float | None] = []
    take = world.inbox.take

    def take_at_once(timeout_s: float | None) -> list[Message]:
        waits.append(timeout_s)
        return take(0)

    with monkeypatch.context() as patch:
        patch.setattr(world.inbox, "take", take_at_once)
        for _ in range(num_turns):
            assert world.engine.turn()
    world.engine.check_integrity()
    return waits


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_the_engine_turns_while_it_computes_and_waits_when_it_has_nothing_to_do(
    make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    world = make_world(runs_ahead=runs_ahead)
    assert _turns(world, 3, monkeypatch) == IDLE
    world.update(admit=[admit(1, [1, 2], 4)])
    # It waits when the update comes; then one turn for each step, and one that finds nothing more to do. The books are checked
    # in the wait after that, not before it, when the next request may be there already.
    num_busy = 4 + runs_ahead
    assert _turns(world, 1 + num_busy + 3, monkeypatch) == [None, *[0] * num_busy, *IDLE]
    assert len(world.sink.reports[-1].finished) == 1


def test_it_waits_while_an_adapter_is_read(make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    world.host.answers_at_once = False
    world.update(admit=[admit(1, [1, 2], 4, "x")])
    world.turn()
    assert _turns(world, 3, monkeypatch) == IDLE
    world.host.deliver()
    assert _turns(world, 2, monkeypatch) == [None, 0]


def test_it_waits_while_nobody_has_a_page(make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(num_pages=2)
    world.update(admit=[admit(1, [1] * 8, 4)])
    world.turn()
    world.turn()
    assert world.sink.reports[-1].starved == (1,)
    assert _turns(world, 3, monkeypatch) == IDLE


def test_it_waits_while_reports_pile_up(make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1, 2], 20)])
    world.turn()
    world.sink.capacity = len(world.sink.reports)
    world.turn()
    assert _turns(world, 3, monkeypatch) == IDLE


def test_without_a_session_it_waits_until_what_it_holds_is_dropped(
    make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1, 2], 20)])
    world.turn()
    world.disconnect()
    world.turn()
    world.clock.now = 10.0
    assert _turns(world, 3, monkeypatch) == [IDLE_CHECK_AFTER_S, 20.0, 20.0]
    world.clock.now = 30.0
    assert _turns(world, 2, monkeypatch) == [0.0, None]
    assert world.engine.num_running == 0
