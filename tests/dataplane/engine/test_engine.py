"""The engine's laws, with a model that hashes what it reads through the page table: right tokens mean right pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dataplane.engine.inbox import SessionEnd
from dataplane.runner.sampling import SampledToken
from protos.planes import EngineFinishReason, StepLogprobs

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, MakeWorld


def test_requests_of_many_adapters_in_one_batch_give_what_each_gives_alone(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world()
    world.update(admit=[admit(1, [5, 6, 7], 9), admit(2, [5, 6, 7], 9, "x"), admit(3, [5, 6, 7], 4, "y"), admit(4, [1] * 50, 6)])
    world.run_until_idle()
    assert world.tokens == {
        1: expect([5, 6, 7], 9),
        2: expect([5, 6, 7], 9, "x", 3),
        3: expect([5, 6, 7], 4, "y", 3),
        4: expect([1] * 50, 6),
    }
    assert {reason for reason, _ in world.finished.values()} == {EngineFinishReason.LENGTH}
    assert world.pool.num_free + world.residency.num_idle_pages == world.pool.num_pages


def test_the_budget_bounds_every_step(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(token_budget=16, num_pages=100)
    world.update(admit=[admit(key, range(key, key + 40), 7) for key in range(6)])
    world.run_until_idle()
    assert world.device.max_step_tokens == 16
    assert world.tokens == {key: expect(range(key, key + 40), 7) for key in range(6)}


def test_one_report_for_each_step_in_sequence(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1, 2], 3)])
    reports = world.run_until_idle()
    assert [r.sequence for r in reports] == [2, 3, 4], "the first answered hello"
    assert [r.timing.num_steps for r in reports] == [1, 2, 3]
    assert [(r.timing.num_prefill_tokens, r.timing.num_decode_tokens) for r in reports] == [(2, 0), (0, 1), (0, 1)]
    assert all(r.applied_update == 1 for r in reports)
    assert reports[-1].pool.free_pages == 64


def test_an_idle_engine_says_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.turn() == []


def test_the_books_are_checked_when_nothing_arrives_and_never_in_the_way_of_news(
    make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.turn()
    checks: list[int] = []
    monkeypatch.setattr(world.pool, "check_integrity", lambda: checks.append(1))
    world.host.answers_at_once = False
    world.update(admit=[admit(1, [1], 1, "x")])
    world.engine.turn(may_wait=False)
    assert checks == [], "the request waits for its adapter, which may be here at any moment"
    world.host.deliver()
    world.engine.turn(may_wait=False)
    assert world.engine.num_running == 0
    assert checks == []
    for _ in range(3):
        world.engine.turn(may_wait=False)
    assert checks == [1], "once for each time that something changed"


def test_an_abort_frees_its_pages_before_the_report_that_applied_it(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, range(20), 100)])
    world.turn()
    update = world.update(abort=[1, 12345])
    (report,) = world.turn()
    assert report.applied_update == update
    assert report.request_keys == ()
    assert report.pool.free_pages == 64
    assert world.finished == {}, "who aborts knows; nothing finished by itself"


def test_a_finished_request_frees_its_pages_in_the_report_that_says_so(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, range(20), 1)])
    (report,) = world.turn()
    assert report.finished[0].reason is EngineFinishReason.LENGTH
    assert report.pool.kv_pages == 0


def test_a_readmission_goes_on_where_the_request_stopped(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world()
    whole = expect([3, 4], 10, "x", 3)
    world.update(admit=[admit(1, [3, 4], 10, "x", output=whole[:6])])
    world.run_until_idle()
    assert world.tokens[1] == whole[6:]


def test_eos_and_stop_tokens_end_a_request_and_are_reported(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    third, second = expect([9], 3)[2], expect([9, 9], 2)[1]
    world = make_world(eos_token_ids=(third,))
    world.update(admit=[admit(1, [9], 50), admit(2, [9, 9], 50, stop_token_ids=(second,)), admit(3, [9], 5, ignore_eos=True)])
    world.run_until_idle()
    assert world.tokens == {1: expect([9], 3), 2: expect([9, 9], 2), 3: expect([9], 5)}
    reasons = {key: reason for key, (reason, _) in world.finished.items()}
    assert reasons == {1: EngineFinishReason.EOS, 2: EngineFinishReason.STOP_TOKEN, 3: EngineFinishReason.LENGTH}


def test_logits_that_are_not_finite_end_that_request_alone(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world()
    world.update(prefetch=["x"])
    world.run_until_idle()
    world.device.alter = lambda tokens: (SampledToken(None), *tokens[1:])
    world.update(admit=[admit(1, [1], 3, "x"), admit(2, [1], 3)])
    world.turn()
    world.device.alter = lambda tokens: tokens
    world.run_until_idle()
    reason, error = world.finished[1]
    assert reason is EngineFinishReason.ADAPTER_FAILED
    assert "position 1" in error
    assert world.tokens == {2: expect([1], 3)}


def test_logprobs_travel_with_their_token(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    logprobs = StepLogprobs(-0.5, (3,), (-0.5,))
    world.device.alter = lambda tokens: (SampledToken(3, logprobs), SampledToken(4))
    world.update(admit=[admit(1, [1], 3), admit(2, [1], 3)])
    (report,) = world.turn()
    assert report.logprobs == {1: logprobs}


def test_starvation_is_said_once_and_ends_with_an_abort(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(num_pages=4, token_budget=32)
    world.update(admit=[admit(1, [1] * 7, 6), admit(2, [2] * 8, 6)])
    reports = world.run_until_idle()
    assert reports[-1].starved == (1, 2), "the oldest is the first to get a page; neither has one"
    assert world.turn() == []
    update = world.update(abort=[2])
    reports = world.run_until_idle()
    assert reports[0].applied_update == update
    assert reports[0].starved == ()
    assert world.tokens[1] == expect([1] * 7, 6)


def test_shutdown_frees_everything_and_ends_the_session(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1], 50, "x")])
    world.turn()
    world.turn()
    world.engine.stop()
    assert world.engine.turn(may_wait=False) is False
    assert world.sink.ended is SessionEnd.SHUTTING_DOWN
    assert world.pool.num_free + world.residency.num_idle_pages == 64


def test_an_exception_in_a_step_ends_the_service(make_world: MakeWorld, admit: Admit, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()

    def fail(chunks: object) -> tuple[SampledToken, ...]:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(world.device, "launch", fail)
    world.update(admit=[admit(1, [1], 50)])
    failures: list[bool] = []
    world.engine.run(on_failure=lambda: failures.append(True))
    assert failures == [True]
    assert world.sink.ended is SessionEnd.ENGINE_FAILED
