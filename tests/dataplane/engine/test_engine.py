"""The engine's laws, with a model that hashes what it reads through the page table: right tokens mean right pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.engine.inbox import SessionEnd
from dataplane.runner.sampling import SampledToken
from protos.planes import AdapterPlace, AdmittedRequest, EngineFinishReason, StepLogprobs

if TYPE_CHECKING:
    from tests.dataplane.conftest import EngineWorld, FakeSink

    Expect = Callable[..., list[int]]
    Admit = Callable[..., AdmittedRequest]
    MakeWorld = type[EngineWorld]


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


def test_an_adapter_on_its_way_delays_only_its_own_requests(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world()
    world.host.answers_at_once = False
    world.update(admit=[admit(1, [1, 2], 3, "slow"), admit(2, [1, 2], 3)])
    world.run_until_idle()
    assert world.tokens == {2: expect([1, 2], 3)}
    world.clock.now = 2.5
    world.host.deliver()
    reports = world.run_until_idle()
    assert world.tokens[1] == expect([1, 2], 3, "slow", 3)
    ready = [r for report in reports for r in report.adapter_ready]
    assert [(r.request_key, r.wait_s) for r in ready] == [(1, 2.5)]


def test_who_finds_the_adapter_on_the_device_has_waited_for_nothing(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1, 2], 3, "x")])
    world.run_until_idle()
    world.sink.capacity = len(world.sink.reports)
    world.update(admit=[admit(2, [1, 2], 3, "x")])
    world.turn()
    world.clock.now = 2.5
    world.sink.capacity = 10_000
    reports = world.run_until_idle()
    assert [(r.request_key, r.wait_s) for report in reports for r in report.adapter_ready] == [(2, 0.0)]


def test_copies_that_take_time_are_joined_before_use(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(num_copy_polls=3)
    world.update(admit=[admit(1, [1, 2], 3, "x"), admit(2, [4], 8), admit(3, [1], 3, "y")])
    world.run_until_idle()
    assert world.tokens == {1: expect([1, 2], 3, "x", 3), 2: expect([4], 8), 3: expect([1], 3, "y", 3)}


def test_a_failed_load_ends_its_requests_and_the_next_admission_tries_again(
    make_world: MakeWorld, admit: Admit, expect: Expect
) -> None:
    world = make_world()
    world.host.errors["bad"] = "image is truncated"
    world.update(admit=[admit(1, [1], 3, "bad"), admit(2, [1], 3, "bad"), admit(3, [1], 3)])
    reports = world.run_until_idle()
    assert world.finished[1] == world.finished[2] == (EngineFinishReason.ADAPTER_FAILED, "image is truncated")
    assert world.tokens == {3: expect([1], 3)}
    events = [e for report in reports for e in report.adapter_events]
    assert [(e.digest, e.place, e.error) for e in events][-1] == ("bad", AdapterPlace.FAILED, "image is truncated")
    world.host.errors.clear()
    world.update(admit=[admit(4, [1], 3, "bad")])
    world.run_until_idle()
    assert world.tokens[4] == expect([1], 3, "bad", 3)


def test_an_adapter_larger_than_the_pool_fails_with_the_numbers(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(num_pages=8, image_pages=lambda digest: 9)
    world.update(admit=[admit(1, [1], 3, "huge")])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.ADAPTER_FAILED, "adapter huge takes 9 pages; the whole pool has 8")


@pytest.mark.parametrize(
    ("request_options", "message"),
    [
        ({"prompt": []}, "0 token_ids of which 0 are output: at least one must be prompt"),
        ({"prompt": [], "output": [1]}, "1 token_ids of which 1 are output"),
        ({"prompt": [1, 50_000]}, "token id 50000 is outside the vocabulary of 50000"),
        ({"prompt": [1] * 200}, "200 tokens leave no room for another: max_model_len is 200"),
        ({"prompt": [1], "output": [1, 2], "max_tokens": 2}, "2 output tokens are there already, max_tokens is 2"),
    ],
)
def test_a_malformed_admission_is_rejected_with_the_reason(
    make_world: MakeWorld, admit: Admit, expect: Expect, request_options: dict[str, object], message: str
) -> None:
    world = make_world()
    world.update(admit=[admit(1, **request_options), admit(2, [1], 3)])
    world.run_until_idle()
    reason, error = world.finished[1]
    assert reason is EngineFinishReason.REJECTED
    assert error.startswith(message)
    assert world.tokens == {2: expect([1], 3)}


def test_a_prompt_larger_than_the_pool_is_rejected(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(num_pages=4)
    world.update(admit=[admit(1, [1] * 17)])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.REJECTED, "17 tokens take 5 pages; the whole pool has 4")


def test_more_requests_than_max_num_seqs_are_rejected(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(max_num_seqs=2)
    world.update(admit=[admit(key, [1], 3) for key in range(3)])
    world.run_until_idle()
    assert world.finished[2] == (EngineFinishReason.REJECTED, "2 requests are running, the limit max_num_seqs is 2")


def test_a_key_used_twice_ends_both(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1], 30)])
    world.turn()
    world.update(admit=[admit(1, [2], 30)])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.REJECTED, "request_key 1 is running already")
    assert world.engine.num_running == 0


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


def test_kv_pushes_out_idle_adapters_and_not_those_in_use(make_world: MakeWorld, admit: Admit, expect: Expect) -> None:
    world = make_world(num_pages=10)
    world.update(admit=[admit(1, [1], 2, "old")])
    world.run_until_idle()
    world.update(admit=[admit(2, [1], 20, "used"), admit(3, [2] * 4, 4)])
    world.run_until_idle()
    assert world.tokens[2] == expect([1], 20, "used", 3)
    assert world.tokens[3] == expect([2] * 4, 4)
    assert {e.digest for e in world.residency.snapshot() if e.place is AdapterPlace.DEVICE} == {"used"}


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


@st.composite
def _requests(draw: st.DrawFn) -> list[tuple[list[int], int, str]]:
    one = st.tuples(
        st.lists(st.integers(0, 99), min_size=1, max_size=25), st.integers(1, 12), st.sampled_from(["", "a", "bb", "ccc"])
    )
    return draw(st.lists(one, min_size=2, max_size=8))


@given(
    requests=_requests(),
    num_pages=st.integers(14, 22),
    token_budget=st.integers(8, 40),
    host_capacity=st.integers(1, 3),
    num_copy_polls=st.integers(0, 2),
    runs_ahead=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_outputs_whatever_chunks_pool_evictions_and_preemptions(
    make_world: MakeWorld,
    admit: Admit,
    expect: Expect,
    requests: list[tuple[list[int], int, str]],
    num_pages: int,
    token_budget: int,
    host_capacity: int,
    num_copy_polls: int,
    runs_ahead: bool,
    data: st.DataObject,
) -> None:
    """A control plane in miniature: it admits at random moments, and recomputes the newest request when others starve."""
    world = make_world(
        num_pages=num_pages,
        token_budget=token_budget,
        max_num_seqs=8,
        image_pages=len,
        host_capacity=host_capacity,
        num_copy_polls=num_copy_polls,
        runs_ahead=runs_ahead,
    )
    waiting = list(enumerate(requests))
    outputs: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    running: dict[int, int] = {}
    next_key = 0
    for _ in range(3000):
        if waiting and (not running or data.draw(st.booleans(), label="admit")):
            i, (prompt, max_tokens, digest) = waiting.pop(0)
            running[next_key] = i
            prefetch = [d for _, (_, _, d) in waiting if d]
            world.update(admit=[admit(next_key, prompt, max_tokens, digest, output=outputs[i])], prefetch=prefetch)
            next_key += 1
        for report in world.turn():
            for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
                if key in running:
                    outputs[running[key]].append(token_id)
            for finished in report.finished:
                assert finished.reason is EngineFinishReason.LENGTH, finished.error
                running.pop(finished.request_key, None)
            if report.starved and running:
                newest = max(running)
                waiting.insert(0, (running[newest], requests[running[newest]]))
                del running[newest]
                world.update(abort=[newest])
        if not waiting and not running:
            break
    assert outputs == {i: expect(prompt, n, digest, len(digest)) for i, (prompt, n, digest) in enumerate(requests)}
    world.run_until_idle()
    assert world.pool.num_free + world.residency.num_idle_pages == num_pages
