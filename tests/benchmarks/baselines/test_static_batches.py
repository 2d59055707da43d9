"""Static batches: one adapter each, the oldest first, padded to their longest, and no longer than there is time."""

from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import pytest

from benchmarks.baselines.static_batches import TIME_IS_UP, BatchCounts, BatchLimits, BatchTooLargeError, Clock, serve_static
from benchmarks.serving.outcome import Outcome, PlannedRequest

STEP_S = 0.5


class FakeGenerator:
    """A clock, and a model whose every step takes as long."""

    def __init__(self, max_tokens: int = 1 << 30) -> None:
        self.now = 0.0
        self.batches: list[list[PlannedRequest]] = []
        self._max_tokens = max_tokens

    def clock(self) -> Clock:
        def sleep(seconds: float) -> None:
            assert seconds > 0
            self.now += seconds

        return Clock(lambda: self.now, sleep)

    def generate(self, requests: Sequence[PlannedRequest], until_s: float) -> Sequence[float]:
        if BatchLimits(0, 0).padded_tokens(requests) > self._max_tokens:
            self.now += STEP_S
            raise BatchTooLargeError
        self.batches.append(list(requests))
        times = []
        for _ in range(max(request.output_tokens for request in requests)):
            self.now += STEP_S
            times.append(self.now)
            if self.now >= until_s:
                break
        return times


def request(index: int, adapter: str = "", at_s: float = 0.0, num_input: int = 4, num_output: int = 2) -> PlannedRequest:
    return PlannedRequest(index, at_s, adapter, num_input, num_output)


def serve(
    requests: Sequence[PlannedRequest], generator: FakeGenerator, max_requests: int = 100, max_seconds: float = 1e9
) -> tuple[list[Outcome], BatchCounts]:
    return serve_static(requests, generator, BatchLimits(max_requests, 1 << 30), max_seconds, generator.clock())


def indices(generator: FakeGenerator) -> list[list[int]]:
    return [[request.index for request in batch] for batch in generator.batches]


def test_the_oldest_request_takes_along_those_of_its_adapter_that_have_arrived() -> None:
    generator = FakeGenerator()
    requests = [request(0, "a"), request(1, "b"), request(2, "a"), request(3, "a", at_s=0.9), request(4, "b", at_s=0.1)]
    serve(requests, generator)
    assert indices(generator) == [[0, 2], [1, 4], [3]]


def test_a_batch_has_no_more_requests_and_no_more_padded_tokens_than_it_may() -> None:
    requests = [request(0, num_input=10), request(1, num_input=4), request(2, num_input=30), request(3, num_input=4)]
    assert [r.index for r in BatchLimits(2, 1000).choose(requests)] == [0, 1]
    assert [r.index for r in BatchLimits(9, 36).choose(requests)] == [0, 1, 3]
    assert [r.index for r in BatchLimits(9, 1).choose(requests)] == [0], "one request is always a batch"


def test_a_request_ends_with_its_own_last_token_and_its_place_in_the_batch_is_lost() -> None:
    generator = FakeGenerator()
    (short, long), counts = serve([request(0, num_output=2), request(1, num_output=6)], generator)
    assert (short.arrivals_s, short.finished_s, short.is_ok) == ([0.5, 1.0], 1.0, True)
    assert (long.num_tokens, long.finished_s) == (6, 3.0)
    assert (counts.batches, counts.steps, counts.computed_tokens) == (1, 6, 12)


def test_nobody_is_served_before_it_arrives() -> None:
    generator = FakeGenerator()
    outcomes, _ = serve([request(0, at_s=7.0), request(1, at_s=2.0)], generator)
    assert [outcome.ttft_s for outcome in outcomes] == [0.5, 0.5]


def test_what_is_not_done_when_the_time_is_up_says_so() -> None:
    generator = FakeGenerator()
    requests = [request(0, "a", num_output=3), request(1, "a", num_output=9), request(2, "b"), request(3, "c", at_s=50.0)]
    outcomes, _ = serve(requests, generator, max_seconds=2.0)
    assert [outcome.status for outcome in outcomes] == ["OK", TIME_IS_UP, TIME_IS_UP, TIME_IS_UP]
    assert [outcome.num_tokens for outcome in outcomes] == [3, 4, 0, 0]
    assert generator.now == 2.0
    only_later, _ = serve([request(0, at_s=50.0)], FakeGenerator(), max_seconds=2.0)
    assert only_later[0].status == TIME_IS_UP


def test_a_batch_that_does_not_fit_in_memory_is_made_smaller_and_stays_so() -> None:
    generator = FakeGenerator(max_tokens=6 * 3)
    outcomes, counts = serve([request(i) for i in range(8)], generator)
    assert all(outcome.is_ok for outcome in outcomes)
    assert indices(generator) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert counts.too_large == 2
    with pytest.raises(BatchTooLargeError):
        serve([request(0)], FakeGenerator(max_tokens=1))


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.floats(0, 20), st.integers(1, 9), st.integers(1, 9)), max_size=12),
    st.integers(1, 4),
)
def test_everybody_is_served_once_and_nobody_overtakes_its_own_adapter(
    drawn: list[tuple[str, float, int, int]], max_requests: int
) -> None:
    generator = FakeGenerator()
    requests = [request(i, *each) for i, each in enumerate(drawn)]
    outcomes, _ = serve(requests, generator, max_requests)
    assert [outcome.request for outcome in outcomes] == requests
    assert all(outcome.num_tokens == outcome.request.output_tokens and outcome.is_ok for outcome in outcomes)
    assert sorted(index for batch in indices(generator) for index in batch) == list(range(len(requests)))
    for batch in generator.batches:
        assert len({each.adapter for each in batch}) == 1 and len(batch) <= max_requests
    for adapter in ("", "a", "b"):
        arrivals = [each.at_s for batch in generator.batches for each in batch if each.adapter == adapter]
        assert arrivals == sorted(arrivals)
