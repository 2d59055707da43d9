"""Metrics of outcomes whose numbers can be worked out by hand."""

from dataclasses import replace

import pytest

from benchmarks.serving.metrics import measure, spread
from benchmarks.serving.outcome import Outcome, PlannedRequest, ServerTimings


def outcome(index: int, at_s: float, arrivals: list[tuple[float, int]], **changes: object) -> Outcome:
    """A request planned for at_s and sent 0.25 s late; arrivals are (time, tokens)."""
    num_tokens = sum(count for _, count in arrivals)
    request = PlannedRequest(index, at_s, f"adapter-{index}" if index else "", 10, num_tokens)
    last = arrivals[-1][0] if arrivals else at_s + 1
    made = Outcome(request, at_s + 0.25, last, [time for time, _ in arrivals], [count for _, count in arrivals])
    return replace(made, **changes)  # type: ignore[arg-type]


# Planned for 1 s: first token after 2 s, five tokens in three messages, the last at 7 s.
FIRST = outcome(0, 1.0, [(3.0, 1), (4.0, 3), (7.0, 1)], server=ServerTimings(0.5, 0.0, 0))
# First token after 8 s: too late for the SLO.
SLOW = outcome(1, 2.0, [(10.0, 1), (11.0, 1)], server=ServerTimings(6.5, 0.0004, 2))
QUICK = outcome(2, 2.0, [(2.5, 4)], server=ServerTimings(0.0, 0.0, 0))
REFUSED = outcome(3, 4.0, [], status="RESOURCE_EXHAUSTED", detail="the queue is full")


def test_latencies_count_from_the_planned_time_to_the_arrival_of_messages() -> None:
    assert FIRST.ttft_s == 2.0  # and not the 1.75 since it was sent
    assert FIRST.e2e_s == 6.0
    assert FIRST.tpot_s == 1.0  # four tokens after the first in four seconds
    assert FIRST.late_s == 0.25


def test_a_message_of_many_tokens_ends_one_wait() -> None:
    assert FIRST.itl_s() == [1.0, 0.0, 0.0, 3.0]
    assert QUICK.itl_s() == []
    assert QUICK.tpot_s is None
    assert sum(FIRST.itl_s()) == FIRST.arrivals_s[-1] - FIRST.arrivals_s[0]


def test_rates_count_what_was_completed_over_all_the_time_until_the_end() -> None:
    measured = measure([FIRST, SLOW, QUICK, REFUSED], wall_s=11.0)
    assert (measured["num_requests"], measured["num_completed"]) == (4, 3)
    assert measured["requests_per_s"] == 3 / 11
    assert measured["output_tokens_per_s"] == 1.0  # 5 + 2 + 4 tokens
    assert measured["tokens_per_message"] == 11 / 6
    assert measured["num_distinct_adapters"] == 3
    assert measured["errors"] == {"RESOURCE_EXHAUSTED": {"count": 1, "first": "the queue is full"}}
    assert measured["num_wrong_length"] == 0


def test_what_failed_or_was_late_counts_against_attainment_and_satisfaction() -> None:
    measured = measure([FIRST, SLOW, QUICK, REFUSED], wall_s=11.0)
    assert measured["slo_attainment"] == 2 / 4
    assert measured["satisfaction"] == pytest.approx(((1 - (2 / 6) ** 2) + 0 + (1 - (0.5 / 6) ** 2) + 0) / 4)
    stricter = measure([FIRST, SLOW, QUICK, REFUSED], wall_s=11.0, slo_s=1.0)
    assert stricter["slo_attainment"] == 1 / 4


def test_an_adapter_that_was_waited_for_is_no_hit_and_the_base_model_is_neither() -> None:
    server = measure([FIRST, SLOW, QUICK, REFUSED], wall_s=11.0)["server"]
    assert server["adapter_hit_rate"] == 1 / 2
    assert server["num_preemptions"] == 2
    assert server["queue_s"]["max"] == 6.5


def test_fewer_tokens_than_asked_for_are_told() -> None:
    short = replace(FIRST, request=replace(FIRST.request, output_tokens=6))
    assert measure([short, QUICK], wall_s=9.0)["num_wrong_length"] == 1


def test_a_server_that_says_nothing_and_a_run_without_success_are_measured_all_the_same() -> None:
    assert measure([replace(QUICK, server=None)], wall_s=1.0)["server"] == {}
    measured = measure([REFUSED], wall_s=0.0)
    assert (measured["requests_per_s"], measured["slo_attainment"], measured["ttft_s"]) == (0.0, 0.0, {})


def test_percentiles_are_those_of_all_values() -> None:
    assert spread(float(n) for n in range(101)) == {"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100}
