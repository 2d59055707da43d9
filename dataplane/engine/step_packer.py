"""What the next step computes: one token of every decoding request, then prefill chunks within the token budget.

Gives pages to requests in the order of their admission. Pure logic: no tensor, no clock, no wire.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from dataplane.engine.request_state import RequestPhase, RequestState
from dataplane.memory.adapter_states import Readiness
from dataplane.memory.page_pool import PagePool


class AdapterAccess(Protocol):
    """Residency as the packer sees it."""

    @property
    def num_idle_pages(self) -> int:
        """Pages that `reclaim` can give free."""
        ...

    def prepare(self, digest: str, may_allocate: bool) -> Readiness:
        """Moves an acquired adapter on towards the device."""
        ...

    def reclaim(self, num_pages: int) -> bool:
        """Evicts idle adapters until that many pages are free; none if it would not suffice."""
        ...


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens start .. start + num_scheduled_tokens of one request; its page table has room for them.

    is_last: whether these are all there are, so that the next token is chosen from the last of them.
    """

    request: RequestState
    start: int
    num_scheduled_tokens: int
    is_decode: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step. Chunks that decode come first, each group in order of admission.

    starved: requests left out for want of a page. ready: those whose adapter was found on the device for the first time.
    """

    chunks: tuple[ScheduledChunk, ...]
    starved: tuple[int, ...]
    ready: tuple[RequestState, ...]
    num_prefill_tokens: int
    num_decode_tokens: int


class StepPacker:
    """Packs steps from one pool."""

    def __init__(self, pool: PagePool, adapters: AdapterAccess, page_tokens: int, token_budget: int) -> None:
        self._pool = pool
        self._adapters = adapters
        self._page_tokens = page_tokens
        self._token_budget = token_budget

    def pack(self, standing: Collection[RequestState]) -> PackedStep:
        """standing: the running requests in the order of their admission; their page tables grow here.

        Once a request is short of pages, those admitted after it get none in this step: what is freed must reach it first.
        """
        num_decoding = sum(request.phase is RequestPhase.DECODE and not request.is_full for request in standing)
        prefill_budget = self._token_budget - num_decoding
        assert prefill_budget >= 0, f"more decoding requests than the token budget {self._token_budget}"
        decode: list[ScheduledChunk] = []
        prefill: list[ScheduledChunk] = []
        starved: list[int] = []
        ready: list[RequestState] = []
        may_allocate = True
        for request in standing:
            if request.is_full:
                continue
            readiness = self._prepare(request, may_allocate, ready)
            if readiness is Readiness.LOADING:
                continue
            is_decode = request.phase is RequestPhase.DECODE
            num_wanted = 1 if is_decode else min(request.num_pending_tokens, prefill_budget)
            num_granted = self._grow(request, num_wanted, may_allocate) if readiness is Readiness.READY else 0
            if readiness is Readiness.STARVED or num_granted < num_wanted:
                may_allocate = False
                if num_granted == 0:
                    starved.append(request.request_key)
            if num_granted:
                is_last = num_granted == request.num_pending_tokens
                chunk = ScheduledChunk(request, request.num_computed_tokens, num_granted, is_decode, is_last)
                (decode if is_decode else prefill).append(chunk)
                prefill_budget -= 0 if is_decode else num_granted
        num_prefill_tokens = sum(chunk.num_scheduled_tokens for chunk in prefill)
        return PackedStep((*decode, *prefill), tuple(starved), tuple(ready), num_prefill_tokens, len(decode))

    def _prepare(self, request: RequestState, may_allocate: bool, ready: list[RequestState]) -> Readiness:
        if not request.adapter_digest:
            return Readiness.READY
        readiness = self._adapters.prepare(request.adapter_digest, may_allocate)
        if readiness is not Readiness.READY:
            request.has_waited_for_adapter = True
        elif not request.is_adapter_ready:
            request.is_adapter_ready = True
            ready.append(request)
        return readiness

    def _grow(self, request: RequestState, num_tokens: int, may_allocate: bool) -> int:
        """Makes room for up to that many more tokens and returns for how many there is."""
        num_room = request.num_pages * self._page_tokens - request.num_computed_tokens
        if num_room < num_tokens and may_allocate:
            num_missing = -(-(num_tokens - num_room) // self._page_tokens)
            num_pages = min(num_missing, self._pool.num_free + self._adapters.num_idle_pages)
            pages = self._pool.allocate(num_pages, request.owner) if self._adapters.reclaim(num_pages) else None
            assert pages is not None, f"{num_pages} pages were free or idle, but could not be had"
            request.add_pages(pages)
            num_room += num_pages * self._page_tokens
        return min(num_tokens, num_room)
