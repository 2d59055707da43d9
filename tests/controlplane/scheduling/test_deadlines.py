"""Deadlines: everyone who is late is found, in order, and ended requests take no memory for long."""

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.messages import FinishReason, RequestSpec
from controlplane.scheduling import Request
from controlplane.scheduling.deadlines import Deadlines


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.booleans(), st.booleans())),
    now=st.integers(0, 9),
)
def test_exactly_the_late_are_taken(
    cases: list[tuple[int | None, int | None, bool, bool]], now: int, spec: Callable[..., RequestSpec]
) -> None:
    deadlines, late = Deadlines(), set()
    for number, (deadline, ttft_deadline, has_token, has_ended) in enumerate(cases):
        request = Request(spec(deadline=deadline, ttft_deadline=ttft_deadline), arrival=number, waiting_since=0.0)
        deadlines.watch(request)
        if has_token:
            request.output_token_ids.append(1)
        if has_ended:
            request.finish(FinishReason.ABORTED, 0.0)
        is_late = (deadline is not None and deadline <= now) or (
            ttft_deadline is not None and ttft_deadline <= now and not has_token
        )
        if is_late and not has_ended:
            late.add(number)
    taken = [request.arrival for request in deadlines.take_expired(now)]
    assert len(taken) == len(set(taken))
    assert set(taken) == late
    rest = deadlines.next()
    assert rest is None or rest > now


def test_ended_requests_are_forgotten_long_before_their_deadline(spec: Callable[..., RequestSpec]) -> None:
    deadlines = Deadlines()
    alive = Request(spec(deadline=1e6), arrival=0, waiting_since=0.0)
    deadlines.watch(alive)
    for number in range(20_000):
        request = Request(spec(deadline=2e6), arrival=1 + number, waiting_since=0.0)
        deadlines.watch(request)
        request.finish(FinishReason.LENGTH, 0.0)
    assert deadlines.num_watched <= 1025
    assert deadlines.take_expired(1e6) == [alive]
