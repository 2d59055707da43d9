"""Steps launched before the tokens of the one before are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.planes import EngineFinishReason

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, FakeSink, MakeWorld


def test_a_runner_that_runs_ahead_computes_the_next_step_before_this_one_is_awaited(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world(runs_ahead=True)
    awaited: list[int] = []
    world.device.on_wait = lambda: awaited.append(world.device.num_launched)
    world.update(admit=[admit(1, [1, 2], 3), admit(2, [4] * 40, 2)])
    reports = world.run_until_idle()
    assert world.tokens == {1: expect([1, 2], 3), 2: expect([4] * 40, 2)}
    assert [r.timing.num_steps for r in reports if r.token_ids] == [1, 2, 3], "one report for each step all the same"
    assert awaited == [2, 3, 3]


def test_what_runs_ahead_of_a_request_that_ends_is_thrown_away(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    third = expect([9], 3)[2]
    world = make_world(runs_ahead=True, eos_token_ids=(third,))
    world.update(admit=[admit(1, [9], 50)])
    world.run_until_idle()
    assert world.tokens == {1: expect([9], 3)}
    assert world.device.num_launched == 4, "the fourth was launched before the third token was known to end it"
    assert world.pool.num_free == world.pool.num_pages


def test_nothing_runs_ahead_of_a_request_whose_last_token_is_on_its_way(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(runs_ahead=True, max_model_len=10)
    world.update(admit=[admit(1, [1], 3)])
    world.run_until_idle()
    assert world.device.num_launched == 3
    world.update(admit=[admit(2, [1] * 8, 50)])
    world.run_until_idle()
    assert (len(world.tokens[2]), world.device.num_launched) == (2, 5)


def test_nobody_starves_for_pages_that_the_step_on_its_way_sets_free(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(runs_ahead=True, num_pages=4)
    # Both hold two pages; the second needs a third for its next token, and the first ends with the step before that.
    world.update(admit=[admit(1, [1] * 7, 1), admit(2, [2] * 8, 3)])
    reports = world.run_until_idle()
    assert [report.starved for report in reports] == [()] * len(reports), "the control plane would preempt the second"
    assert world.tokens == {1: expect([1] * 7, 1), 2: expect([2] * 8, 3)}


def test_that_an_adapter_is_ready_is_said_though_its_request_waits_for_the_step_on_its_way(
    make_world: MakeWorld, admit: Admit
) -> None:
    world = make_world(runs_ahead=True, num_pages=7)
    world.update(prefetch=["x"])
    world.run_until_idle()
    world.update(admit=[admit(1, [1] * 7, 1), admit(2, [2] * 8, 3)])
    world.turn()
    world.update(admit=[admit(3, [3] * 4, 1, "x")])
    reports = world.run_until_idle()
    assert [ready.request_key for report in reports for ready in report.adapter_ready] == [3]
    assert not any(report.starved for report in reports)
    assert {reason for reason, _ in world.finished.values()} == {EngineFinishReason.LENGTH}


def test_a_key_that_is_admitted_again_while_its_step_runs_does_not_get_the_old_token(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world(runs_ahead=True)
    world.update(admit=[admit(1, [5, 6], 9)])
    world.turn()
    world.update(abort=[1], admit=[admit(1, [7], 4)])
    world.run_until_idle()
    assert world.tokens == {1: expect([7], 4)}


def test_a_session_that_ends_while_a_step_runs_takes_its_tokens_along(
    make_world: MakeWorld, make_sink: type[FakeSink], admit: Admit
) -> None:
    world = make_world(runs_ahead=True)
    world.update(admit=[admit(1, [5, 6], 9)])
    world.turn()
    world.disconnect()
    world.connect(make_sink())
    world.update(abort=[1])
    reports = world.run_until_idle()
    assert [r.token_ids for r in reports] == [()]
    assert world.pool.num_free == world.pool.num_pages
