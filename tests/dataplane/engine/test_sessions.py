"""The engine and its sessions: what a new one is told, and what becomes of the requests of one that ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataplane.engine.inbox import SessionEnd
from protos.planes import AdapterPlace

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, FakeSink, MakeWorld


def test_the_first_report_of_a_session_names_what_is_held(make_world: MakeWorld, make_sink: type[FakeSink], admit: Admit) -> None:
    world = make_world()
    assert world.sink.reports[0].state is not None
    assert world.sink.reports[0].state.epoch == 7
    world.update(admit=[admit(1, [1], 50, "x"), admit(2, [1], 50)])
    world.turn()
    world.turn()
    world.disconnect()
    world.turn()
    second = make_sink()
    world.connect(second)
    (report,) = second.reports
    assert (report.sequence, report.applied_update) == (1, 0)
    assert report.state is not None
    assert report.state.held_request_keys == (1, 2)
    assert [(e.digest, e.place, e.num_pages) for e in report.state.adapters] == [("x", AdapterPlace.DEVICE, 3)]


def test_held_requests_stand_still_until_the_new_session_speaks(
    make_world: MakeWorld, make_sink: type[FakeSink], admit: Admit, expect: Expect
) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1], 50)])
    world.turn()
    world.connect(make_sink())
    assert world.turn() == [], "no token under a key that the new session has not confirmed"
    world.tokens.clear()
    world.update(abort=[1], admit=[admit(1, [8], 3)])
    world.run_until_idle()
    assert world.tokens == {1: expect([8], 3)}


def test_a_new_session_takes_over(make_world: MakeWorld, make_sink: type[FakeSink], admit: Admit) -> None:
    world = make_world()
    first = world.sink
    world.connect(make_sink())
    assert first.ended is SessionEnd.TAKEN_OVER
    world.sink, second = first, world.sink
    world.update(admit=[admit(1, [1], 5)])
    world.turn()
    assert world.engine.num_running == 0, "an update of the session that is over changes nothing"
    assert second.ended is None


def test_orphans_stand_still_and_are_dropped_after_the_grace_period(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1], 50, "x")], pinned=["x"])
    world.turn()
    world.turn()
    world.disconnect()
    world.turn()
    world.clock.now = 29.0
    world.turn()
    assert world.engine.num_running == 1
    assert world.pool.num_free < 64
    world.clock.now = 30.5
    world.turn()
    assert world.engine.num_running == 0
    assert world.pool.num_free + world.residency.num_idle_pages == 64


def test_a_session_that_does_not_read_pauses_the_engine_and_loses_nothing(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world()
    world.sink.capacity = 3
    world.update(admit=[admit(1, [1], 10)])
    for _ in range(10):
        world.turn()
    assert len(world.sink.reports) == 3
    world.sink.capacity = 1000
    world.run_until_idle()
    assert world.tokens == {1: expect([1], 10)}


def test_every_update_gives_its_credit_back(make_world: MakeWorld) -> None:
    world = make_world()
    for _ in range(3):
        world.update()
    world.turn()
    assert world.sink.num_applied == 3
