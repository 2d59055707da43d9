"""The page ledger of one data plane: how many pages its requests and adapters take, counted from what crosses the wire.

Counts only; where pages lie is the data plane's business. Never below what the data plane really uses as of any report.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from controlplane.messages import AdapterRef


@dataclass(slots=True)
class _Charge:
    """The KV pages of one admission. An aborted one (`is_dying`) keeps them until its abort has been applied."""

    num_tokens: int
    pages: int
    max_pages: int
    digest: str
    is_dying: bool = False

    @property
    def lookahead(self) -> int:
        return 1 if self.pages < self.max_pages else 0


@dataclass(slots=True)
class _AdapterUse:
    """Why an adapter's pages cannot be reclaimed: live and dying requests use it, or it is pinned and on the device."""

    pages: int
    live: int = 0
    dying: int = 0
    is_pinned: bool = False

    @property
    def live_pages(self) -> int:
        return self.pages if self.live or self.is_pinned else 0

    @property
    def held_pages(self) -> int:
        return self.pages if self.live or self.dying or self.is_pinned else 0


class Ledger:
    """Exact page counts of one data plane, all of them kept up to date as things change, never summed up anew.

    A request with t tokens is charged ceil((t + 1) / page_tokens) pages, never more than its longest form needs: its t tokens
    and the one that the step under way may add. That covers an engine that runs a step ahead too: when it reports token t, the
    step that computes t is launched and has its page, and nothing further. What it computes for nothing, behind a token that
    ended the request, is within the same page count. Admission looks one page further ahead for every running request.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self._page_tokens = page_tokens
        self._charges: dict[int, _Charge] = {}
        self._adapters: dict[str, _AdapterUse] = {}
        self._pinned: set[str] = set()
        self._pinned_pages = 0
        self._dying: deque[tuple[int, int]] = deque()  # (sequence of the update that aborts it, request_key)
        self.kv_pages = 0
        self.dying_kv_pages = 0
        self.lookahead_pages = 0
        self.adapter_pages = 0
        self.live_adapter_pages = 0

    @property
    def num_requests(self) -> int:
        """Admissions that take a place in the batch, dying ones included."""
        return len(self._charges)

    @property
    def used_pages(self) -> int:
        """Pages of requests and of adapters in use, dying ones included."""
        return self.kv_pages + self.adapter_pages

    @property
    def shortage(self) -> int:
        """Pages that the living requests are about to need beyond what the pool has; 0 if it is large enough."""
        return max(0, self.kv_pages - self.dying_kv_pages + self.live_adapter_pages - self.num_pages)

    def num_adapter_requests(self, digest: str) -> int:
        """Living requests that use this adapter."""
        use = self._adapters.get(digest)
        return use.live if use is not None else 0

    def longest_pages(self, max_num_tokens: int) -> int:
        """KV pages of a request at its longest."""
        return -(-max_num_tokens // self._page_tokens)

    def available_pages(self, digest: str) -> int:
        """Pages that a request of this adapter could have, with its adapter, if it were alone: all that others did not pin."""
        own = self._adapters[digest].pages if digest in self._pinned else 0
        return self.num_pages - self._pinned_pages + own

    def can_ever_admit(self, max_num_tokens: int, adapter: AdapterRef | None) -> bool:
        """Whether the request fits at its longest when nothing else runs."""
        adapter_pages, digest = (adapter.num_pages, adapter.digest) if adapter is not None else (0, "")
        return self.longest_pages(max_num_tokens) + adapter_pages <= self.available_pages(digest)

    def can_admit(self, num_tokens: int, max_num_tokens: int, adapter: AdapterRef | None) -> bool:
        """Whether the request fits now, with one page to spare for it and for every running request."""
        longest = self.longest_pages(max_num_tokens)
        needed = min(num_tokens // self._page_tokens + 2, longest)
        if adapter is not None:
            use = self._adapters.get(adapter.digest)
            if use is None or not use.held_pages:
                needed += adapter.num_pages
        return self.used_pages + self.lookahead_pages + needed <= self.num_pages

    def charge(self, request_key: int, num_tokens: int, max_num_tokens: int, adapter: AdapterRef | None) -> None:
        """Books an admission."""
        longest = self.longest_pages(max_num_tokens)
        pages = min(num_tokens // self._page_tokens + 1, longest)
        charge = _Charge(num_tokens, pages, longest, adapter.digest if adapter is not None else "")
        self._charges[request_key] = charge
        self.kv_pages += pages
        self.lookahead_pages += charge.lookahead
        if adapter is not None:
            self._use_adapter(adapter.digest, adapter.num_pages, live=1)

    def grow(self, request_key: int, num_tokens: int = 1) -> None:
        """Books that many more tokens of an admission; nothing if it is not on the books any more."""
        charge = self._charges.get(request_key)
        if charge is None:
            return
        charge.num_tokens += num_tokens
        pages = charge.num_tokens // self._page_tokens + 1
        if pages <= charge.pages:
            return
        added = min(pages, charge.max_pages) - charge.pages
        if added <= 0:
            return
        lookahead = charge.lookahead
        charge.pages += added
        self.kv_pages += added
        if charge.is_dying:
            self.dying_kv_pages += added
        else:
            self.lookahead_pages += charge.lookahead - lookahead

    def release(self, request_key: int) -> None:
        """Frees an admission's pages: the data plane has said that it ended. Nothing if it is not on the books."""
        charge = self._charges.pop(request_key, None)
        if charge is None:
            return
        self.kv_pages -= charge.pages
        if charge.is_dying:
            self.dying_kv_pages -= charge.pages
        else:
            self.lookahead_pages -= charge.lookahead
        if charge.digest:
            self._use_adapter(charge.digest, None, live=0 if charge.is_dying else -1, dying=-1 if charge.is_dying else 0)

    def release_when_applied(self, request_key: int, sequence: int) -> None:
        """Marks an admission as aborted by that update; its pages stay booked until the update has been applied."""
        charge = self._charges[request_key]
        assert not charge.is_dying, f"request_key {request_key} is aborted twice"
        self.lookahead_pages -= charge.lookahead
        charge.is_dying = True
        self.dying_kv_pages += charge.pages
        if charge.digest:
            self._use_adapter(charge.digest, None, live=-1, dying=1)
        self._dying.append((sequence, request_key))

    def applied(self, sequence: int) -> None:
        """Frees what updates up to this one aborted."""
        while self._dying and self._dying[0][0] <= sequence:
            self.release(self._dying.popleft()[1])

    def set_pinned(self, digests: Collection[str], pages_on_device: Mapping[str, int]) -> None:
        """Books the pinned adapters that lie on the device; the others take no pages yet."""
        pinned = {digest for digest in digests if digest in pages_on_device}
        for digest in self._pinned - pinned:
            self._use_adapter(digest, None, is_pinned=False)
        for digest in pinned:
            self._use_adapter(digest, pages_on_device[digest], is_pinned=True)
        self._pinned = pinned
        self._pinned_pages = sum(self._adapters[digest].pages for digest in pinned)

    def _use_adapter(
        self, digest: str, pages: int | None, *, live: int = 0, dying: int = 0, is_pinned: bool | None = None
    ) -> None:
        use = self._adapters.get(digest)
        if use is None:
            assert pages is not None, f"adapter {digest} is not on the books"
            use = self._adapters[digest] = _AdapterUse(pages)
        self.adapter_pages -= use.held_pages
        self.live_adapter_pages -= use.live_pages
        use.live += live
        use.dying += dying
        if is_pinned is not None:
            use.is_pinned = is_pinned
        self.adapter_pages += use.held_pages
        self.live_adapter_pages += use.live_pages
        if not use.held_pages:
            del self._adapters[digest]

    def check_integrity(self) -> None:
        """Sums everything up anew and compares; for tests and idle times."""
        charges = self._charges.values()
        assert self.kv_pages == sum(c.pages for c in charges)
        assert self.dying_kv_pages == sum(c.pages for c in charges if c.is_dying)
        assert self.lookahead_pages == sum(c.lookahead for c in charges if not c.is_dying)
        assert self.adapter_pages == sum(use.held_pages for use in self._adapters.values())
        assert self.live_adapter_pages == sum(use.live_pages for use in self._adapters.values())
        assert all(self._charges[key].is_dying for _, key in self._dying if key in self._charges)
        for digest, use in self._adapters.items():
            users = [c for c in charges if c.digest == digest]
            assert (use.live, use.dying) == (sum(not c.is_dying for c in users), sum(c.is_dying for c in users)), digest
            assert use.is_pinned == (digest in self._pinned)
