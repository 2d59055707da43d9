"""Laws of packing a step: the token budget, the order of admission, who is left out for want of a page."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.engine.request_state import RequestPhase, RequestState
from dataplane.engine.step_packer import PackedStep, StepPacker
from dataplane.memory.adapter_states import Readiness
from dataplane.memory.page_pool import PageKind, PageOwner, PagePool
from protos.planes import AdmittedRequest, EngineSampling

PAGE_TOKENS = 4


class FixedAdapters:
    """Adapters by digest in a fixed readiness; some pages of idle ones can be reclaimed."""

    def __init__(self, pool: PagePool, readiness: dict[str, Readiness], num_idle_pages: int = 0) -> None:
        self._pool = pool
        self._readiness = readiness
        self._owner = PageOwner(PageKind.ADAPTER, "idle")
        self._idle = list(pool.allocate(num_idle_pages, self._owner) or ())

    @property
    def num_idle_pages(self) -> int:
        return len(self._idle)

    def prepare(self, digest: str, may_allocate: bool) -> Readiness:
        return self._readiness[digest]

    def reclaim(self, num_pages: int) -> bool:
        if self._pool.num_free + len(self._idle) < num_pages:
            return False
        while self._pool.num_free < num_pages:
            self._pool.free([self._idle.pop()], self._owner)
        return True


def _request(key: int, num_tokens: int, digest: str = "") -> RequestState:
    sampling = EngineSampling(max_tokens=1000)
    return RequestState(AdmittedRequest(key, str(key), tuple(range(num_tokens)), 0, digest, sampling), 0.0, 10_000)


def _compute(packed: PackedStep) -> None:
    """What the engine does after a step."""
    for chunk in packed.chunks:
        chunk.request.launch(chunk.num_scheduled_tokens)
        if chunk.is_last:
            chunk.request.append(0)


def _packer(pool: PagePool, token_budget: int, readiness: dict[str, Readiness] | None = None, num_idle: int = 0) -> StepPacker:
    return StepPacker(pool, FixedAdapters(pool, readiness or {}, num_idle), PAGE_TOKENS, token_budget)


def _scheduled(packed: PackedStep) -> dict[int, int]:
    return {chunk.request.request_key: chunk.num_scheduled_tokens for chunk in packed.chunks}


def test_every_decoding_request_gets_its_token_before_any_prefill() -> None:
    packer = _packer(PagePool(100), token_budget=10)
    old, young = _request(1, 3), _request(2, 3)
    _compute(packer.pack([old, young]))
    long = _request(3, 50)
    assert _scheduled(packer.pack([long, old, young])) == {1: 1, 2: 1, 3: 8}


def test_prefill_chunks_are_cut_in_order_of_admission() -> None:
    packed = _packer(PagePool(100), token_budget=10).pack([_request(1, 4), _request(2, 9), _request(3, 9)])
    assert _scheduled(packed) == {1: 4, 2: 6}
    assert packed.starved == (), "who got no share of the budget does not lack a page"
    assert (packed.num_prefill_tokens, packed.num_decode_tokens) == (10, 0)


def test_a_request_whose_adapter_is_loading_holds_up_nobody() -> None:
    packer = _packer(PagePool(100), 100, {"slow": Readiness.LOADING, "here": Readiness.READY})
    packed = packer.pack([_request(1, 5, "slow"), _request(2, 5), _request(3, 5, "here")])
    assert _scheduled(packed) == {2: 5, 3: 5}
    assert packed.starved == ()


def test_a_request_is_named_ready_once() -> None:
    packer = _packer(PagePool(100), 100, {"here": Readiness.READY})
    request = _request(1, 5, "here")
    assert packer.pack([request]).ready == (request,)
    assert packer.pack([request]).ready == ()


def test_after_a_starved_request_nobody_younger_gets_a_page() -> None:
    pool = PagePool(4)
    packer = _packer(pool, 100)
    first, second = _request(1, 4), _request(2, 3)
    _compute(packer.pack([first, second]))
    other = PageOwner(PageKind.KV, 99)
    rest = pool.allocate(2, other)
    assert rest is not None
    # The first needs a second page for its next token and cannot have one; the second still has a slot left in its own.
    packed = packer.pack([first, second, _request(3, 2)])
    assert _scheduled(packed) == {2: 1}
    assert packed.starved == (1, 3)
    _compute(packed)
    pool.free(rest[:1], other)
    assert _scheduled(packer.pack([first, second, _request(3, 2)])) == {1: 1}, "the page that came free is the oldest's"


def test_a_starved_adapter_keeps_pages_from_younger_requests() -> None:
    packer = _packer(PagePool(100), 100, {"big": Readiness.STARVED})
    packed = packer.pack([_request(1, 5, "big"), _request(2, 5)])
    assert packed.chunks == ()
    assert packed.starved == (1, 2)


def test_idle_adapters_give_way_to_kv() -> None:
    packer = _packer(PagePool(4), 100, num_idle=4)
    assert _scheduled(packer.pack([_request(1, 9)])) == {1: 9}


def test_a_prefill_takes_the_pages_there_are() -> None:
    packed = _packer(PagePool(2), 100).pack([_request(1, 20)])
    assert _scheduled(packed) == {1: 8}
    assert packed.starved == ()


@st.composite
def _workloads(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    return draw(st.integers(1, 20)), draw(st.integers(len(lengths), 40)), draw(st.integers(0, 10)), lengths


@given(workload=_workloads(), num_steps=st.integers(1, 15))
@settings(max_examples=80, deadline=None)
def test_budget_order_and_slots_hold_in_any_step(workload: tuple[int, int, int, list[int]], num_steps: int) -> None:
    num_pages, token_budget, num_idle, lengths = workload
    pool = PagePool(num_pages)
    packer = _packer(pool, token_budget, num_idle=min(num_idle, num_pages))
    standing = [_request(key, length) for key, length in enumerate(lengths)]
    for _ in range(num_steps):
        packed = packer.pack(standing)
        pool.check_integrity()
        _check_step(packed, standing, token_budget)
        _compute(packed)


def _check_step(packed: PackedStep, standing: Sequence[RequestState], token_budget: int) -> None:
    scheduled = _scheduled(packed)
    assert len(scheduled) == len(packed.chunks), "a request is scheduled twice"
    assert scheduled.keys().isdisjoint(packed.starved), "a request is both scheduled and starved"
    assert sum(scheduled.values()) <= token_budget
    for chunk in packed.chunks:
        request = chunk.request
        assert 1 <= chunk.num_scheduled_tokens <= request.num_pending_tokens
        assert request.num_computed_tokens + chunk.num_scheduled_tokens <= len(request.page_table) * PAGE_TOKENS
    decoding = {r.request_key for r in standing if r.phase is RequestPhase.DECODE}
    assert decoding <= scheduled.keys() | set(packed.starved), "a decoding request was left out without a reason"
    budget_left = token_budget - sum(scheduled.values())
    for request in standing:
        if request.request_key not in scheduled and request.request_key not in packed.starved:
            assert budget_left <= len(packed.starved), "a request waits although there is budget"
