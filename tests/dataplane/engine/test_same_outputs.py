"""One law over all: no chunk, pool size, eviction or preemption changes what a request is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.planes import EngineFinishReason

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, MakeWorld


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
