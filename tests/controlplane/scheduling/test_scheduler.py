"""The scheduler's decisions one by one: order, preemption, deadlines, placement, prefetch, loss of a data plane."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from benchmarks.null_engine import NullConfig
from controlplane.errors import (
    AbortedError,
    DataLossError,
    DeadlineError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
)
from controlplane.messages import AdapterRef, FinishReason, RequestSpec
from controlplane.scheduling import FcfsPolicy, RequestState
from controlplane.scheduling.data_plane import split_by_tokens
from protos.planes import AdmittedRequest, EngineSampling

if TYPE_CHECKING:
    from tests.controlplane.scheduling.conftest import Harness

MakeSpec = Callable[..., RequestSpec]
MakeAdapter = Callable[..., AdapterRef]
MakeHarness = Callable[..., "Harness"]


def test_requests_run_to_their_end_and_give_the_right_tokens(spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig()])
    requests = [world.submit(spec(seed=n, adapter=adapter(n % 3) if n % 3 else None)) for n in range(10)]
    world.run()
    for request in requests:
        assert world.tokens[request] == world.expected(request)
        assert world.ended[request].outcome.reason is FinishReason.LENGTH
    assert set(world.started) == set(requests)
    assert len(world.started) == len(requests)


def test_admission_is_by_priority_then_by_arrival(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=1)])
    first = world.submit(spec(seed=1))
    low, high, low_too = (world.submit(spec(seed=n, priority=p)) for n, p in ((2, 0), (3, 5), (4, 0)))
    world.run()
    assert world.started == [first, high, low, low_too]


def test_the_place_of_a_finished_request_is_taken_by_the_very_next_update(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=2)])
    first, second, third = (world.submit(spec(max_tokens=n, seed=n)) for n in (3, 9, 2))
    wire = world.wires["dp0"]
    while first not in world.ended:
        while wire.apply_update():
            pass
        wire.step()
        world.deliver_report("dp0")
    assert [[admitted.request_key for admitted in update.admit] for update in wire.updates] == [[third.request_key]]
    world.run()
    assert second in world.ended


def test_a_long_queue_of_many_adapters_keeps_the_batch_full_and_preempts_nobody(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    # The saturated load of the S-LoRA paper on a large GPU, at a sixteenth of its places and pages.
    config = NullConfig(num_pages=856, max_num_seqs=16, token_budget=128, max_model_len=2048, runs_ahead=True)
    world, rng = harness([config]), random.Random(42)
    for n in range(48):
        world.submit(spec(rng.randrange(8, 512), rng.randrange(8, 512), adapter(n), seed=n))
    while world.scheduler.num_waiting:
        assert world.turn()
        assert world.scheduler.num_running == 16 or not world.scheduler.num_waiting
    world.run()
    assert world.scheduler.connected["dp0"].num_preemptions == 0


def test_the_waiting_queue_is_bounded(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=1)], max_waiting=2)
    for n in range(3):
        world.submit(spec(seed=n))
    with pytest.raises(QueueFullError, match="2 requests wait, at most 2 may"):
        world.submit(spec(seed=9))


def test_requests_put_back_do_not_count_against_the_bound(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig()], max_waiting=1)
    requests = [world.submit(spec(seed=n)) for n in range(3)]
    world.lose(0)
    assert world.scheduler.num_waiting == len(requests)
    world.connect(0)
    world.run()


def test_a_large_request_is_overtaken_but_only_so_often(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=4)], FcfsPolicy(max_overtakes=3))
    world.submit(spec(prompt_tokens=8, max_tokens=8, seed=1))
    large = world.submit(spec(prompt_tokens=40, max_tokens=24, seed=2))  # all four pages
    small = [world.submit(spec(prompt_tokens=4, max_tokens=8, seed=10 + n)) for n in range(20)]
    world.run()
    assert world.started.index(large) <= 1 + 3
    assert large.state is RequestState.FINISHED
    assert all(request in world.ended for request in small)


def test_the_latest_arrival_is_preempted_when_pages_run_out_and_goes_on_later(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=8)])
    requests = [world.submit(spec(prompt_tokens=10, max_tokens=70, seed=n)) for n in range(3)]  # 5 pages each in the end
    world.run()
    assert requests[0].num_preemptions == 0
    assert requests[-1].num_preemptions > 0
    for request in requests:
        assert world.tokens[request] == world.expected(request)
        assert world.ended[request].outcome.num_preemptions == request.num_preemptions


def test_lower_priority_is_preempted_before_later_arrival(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=8)])
    low = world.submit(spec(prompt_tokens=10, max_tokens=70, seed=1, priority=-1))
    high = world.submit(spec(prompt_tokens=10, max_tokens=70, seed=2))
    world.run()
    assert (high.num_preemptions, low.num_preemptions > 0) == (0, True)


def test_starvation_preempts_once_until_the_abort_is_applied(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=64)])
    requests = [world.submit(spec(prompt_tokens=20, max_tokens=60, seed=n)) for n in range(4)]
    world.turn()
    wire = world.wires["dp0"]
    wire.engine.steal_pages(wire.engine.counts.free_pages)  # what the ledger does not know
    while not any(request.num_preemptions for request in requests):
        assert wire.step()
        world.deliver_report("dp0")
    for _ in range(3):
        wire.step()
        world.deliver_report("dp0")
    assert [request.num_preemptions for request in requests] == [0, 0, 0, 1]


def test_a_request_that_finds_no_page_though_alone_is_given_up(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=8)])
    world.wires["dp0"].engine.steal_pages(7)
    request = world.submit(spec(prompt_tokens=20, max_tokens=20))
    world.run()
    error = world.ended[request].outcome.error
    assert isinstance(error, UnavailableError)
    assert error.reason == "NO_PROGRESS"


def test_what_can_never_fit_is_found_out_before_it_is_queued(spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=8), NullConfig(num_pages=6)])
    assert world.scheduler.check_fits(spec(prompt_tokens=64, max_tokens=64)) is None
    shortfall = world.scheduler.check_fits(spec(prompt_tokens=64, max_tokens=64, adapter=adapter(1)))
    assert shortfall is not None
    assert (shortfall.kv_pages, shortfall.adapter_pages, shortfall.available_pages) == (8, 2, 8)


def test_a_waiting_request_that_no_longer_fits_because_of_a_pin_is_refused(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(num_pages=8, max_num_seqs=1, adapter_pages=3)])
    running = world.submit(spec(adapter=adapter(1, num_pages=3), max_tokens=30))
    waiting = world.submit(spec(prompt_tokens=64, max_tokens=64, seed=2))
    for _ in range(4):
        world.turn()
    world.scheduler.set_pinned([adapter(1).digest])
    world.schedule()
    world.run()
    assert world.ended[running].outcome.reason is FinishReason.LENGTH
    error = world.ended[waiting].outcome.error
    assert isinstance(error, ResourceExhaustedError)
    assert "needs 8 pages" in str(error) and "at most 5 are not pinned" in str(error)


def test_deadlines_end_waiting_and_running_requests(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=1)])
    running = world.submit(spec(max_tokens=50, deadline=10.0, seed=1))
    waiting = world.submit(spec(deadline=5.0, seed=2))
    world.turn()
    assert world.scheduler.next_wakeup(world.now) == 5.0
    world.now = 5.0
    world.expire()
    assert list(world.ended) == [waiting]
    assert isinstance(world.ended[waiting].outcome.error, DeadlineError)
    world.now = 10.0
    world.expire()
    assert isinstance(world.ended[running].outcome.error, DeadlineError)
    assert world.scheduler.next_wakeup(world.now) is None
    world.run()


def test_the_deadline_of_the_first_token_counts_until_that_token(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=1)])
    early = world.submit(spec(max_tokens=50, ttft_deadline=5.0, deadline=90.0, seed=1))
    late = world.submit(spec(ttft_deadline=5.0, seed=2))
    world.turn()
    world.now = 6.0
    world.expire()
    assert list(world.ended) == [late]
    error = world.ended[late].outcome.error
    assert isinstance(error, AbortedError)
    assert error.reason == "SLO_EARLY_ABORT"
    assert world.scheduler.next_wakeup(world.now) == 90.0
    world.run()
    assert world.tokens[early] == world.expected(early)


def test_a_broken_adapter_ends_its_own_requests_only(spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig(broken_adapters=frozenset({adapter(1).digest}))])
    broken, whole = world.submit(spec(adapter=adapter(1))), world.submit(spec(adapter=adapter(2), seed=1))
    world.run()
    error = world.ended[broken].outcome.error
    assert isinstance(error, DataLossError)
    assert "adapter-1" in str(error) and "broken" in str(error)
    assert world.tokens[whole] == world.expected(whole)


def test_removing_an_adapter_ends_its_waiting_and_running_requests(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(max_num_seqs=2)])
    users = [world.submit(spec(adapter=adapter(1), seed=n)) for n in range(3)]
    other = world.submit(spec(seed=9))
    world.turn()
    ended = world.scheduler.end_adapter(adapter(1).digest, world.now)
    assert {each.request for each in ended} == set(users)
    assert {each.outcome.error.reason for each in ended if each.outcome.error} == {"ADAPTER_REMOVED"}
    world.ended.update({each.request: each for each in ended})
    world.schedule()
    world.run()
    assert world.tokens[other] == world.expected(other)


def test_a_lost_data_plane_loses_and_doubles_no_token(spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig()])
    requests = [world.submit(spec(max_tokens=30, seed=n, adapter=adapter(n) if n else None)) for n in range(3)]
    for _ in range(9):
        world.turn()
    before = {request: len(world.tokens[request]) for request in requests}
    assert all(before.values())
    kept = world.lose(0)
    world.connect(0, keep_engine=kept)  # the same start of the engine, which still holds them under old keys
    world.run()
    assert not kept.engine.standing
    for request in requests:
        assert world.tokens[request] == world.expected(request)
    assert len(world.started) == len(requests)


def test_a_request_whose_data_plane_dies_each_time_is_given_up(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig()])
    request = world.submit(spec())
    for attempt in range(3):
        assert request not in world.ended, attempt
        world.lose(0)
        world.connect(0)
    error = world.ended[request].outcome.error
    assert isinstance(error, UnavailableError)
    assert "after 3 attempts" in str(error)


def test_what_only_a_forgotten_data_plane_could_run_is_refused(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(num_pages=8), NullConfig(num_pages=4)])
    large, small = world.submit(spec(prompt_tokens=64, max_tokens=64)), world.submit(spec(seed=1))
    world.lose(0)
    for _ in range(20):
        world.turn()
    assert large not in world.ended
    world.scheduler.forget_data_plane("dp0")
    world.schedule()
    assert isinstance(world.ended[large].outcome.error, ResourceExhaustedError)
    world.run()
    assert world.tokens[small] == world.expected(small)


def test_requests_go_to_the_least_loaded_data_plane(spec: MakeSpec, harness: MakeHarness) -> None:
    world = harness([NullConfig(max_num_seqs=8), NullConfig(max_num_seqs=8)])
    requests = [world.submit(spec(seed=n)) for n in range(8)]
    assert [request.address for request in requests].count("dp0") == 4


def test_requests_of_one_adapter_gather_where_it_is_until_that_is_too_loaded(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(max_num_seqs=10), NullConfig(max_num_seqs=10)])
    requests = [world.submit(spec(seed=n, adapter=adapter(1))) for n in range(8)]
    addresses = [request.address for request in requests]
    assert addresses[:3] == ["dp0"] * 3
    assert set(addresses) == {"dp0", "dp1"}


def test_adapters_of_the_first_waiting_requests_are_prefetched_in_order(
    spec: MakeSpec, adapter: MakeAdapter, harness: MakeHarness
) -> None:
    world = harness([NullConfig(max_num_seqs=1)])
    world.submit(spec(max_tokens=50))
    for n in (3, 1, 3, 2):
        world.submit(spec(adapter=adapter(n), seed=n))
    world.scheduler.preload(adapter(7).digest)
    world.schedule()
    lists = [update.prefetch for update in world.wires["dp0"].updates if update.prefetch is not None]
    assert lists[-1] == tuple(adapter(n).digest for n in (3, 1, 2, 7))
    world.run()


def test_a_preloaded_adapter_leaves_the_list_when_it_has_arrived(adapter: MakeAdapter, harness: MakeHarness) -> None:
    world = harness([NullConfig()])
    world.scheduler.preload(adapter(7).digest)
    world.schedule()
    for _ in range(6):
        world.turn()
    assert adapter(7).digest in world.wires["dp0"].engine.on_device
    assert world.scheduler.schedule(world.now).updates == []
    assert world.wires["dp0"].engine.prefetch == ()


def test_the_first_update_replaces_the_lists_of_an_earlier_session_and_then_nothing_is_sent_twice(
    spec: MakeSpec, harness: MakeHarness
) -> None:
    world = harness([NullConfig()])
    first = world.wires["dp0"].updates.popleft()
    assert (first.sequence, first.prefetch, first.pinned, first.admit) == (1, (), (), ())
    assert not world.wires["dp0"].updates
    world.wires["dp0"].engine.apply(first)
    world.submit(spec())
    assert len(world.wires["dp0"].updates) == 1
    world.run()
    assert world.scheduler.schedule(world.now).updates == []


def test_admissions_are_split_so_that_no_update_grows_too_large() -> None:
    admits = [AdmittedRequest(n, "", (1,) * size, 0, "", EngineSampling(max_tokens=1)) for n, size in enumerate((5, 5, 20, 1, 9))]
    groups = split_by_tokens(admits, max_tokens=10)
    assert [[admitted.request_key for admitted in group] for group in groups] == [[0, 1], [2], [3, 4]]
