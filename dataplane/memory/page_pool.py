"""Which page belongs to whom. Owns the page ids of the pool and knows nothing of the bytes in them or of requests."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class PageKind(Enum):
    """What a page holds."""

    KV = "kv"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class PageOwner:
    """Who holds a page: a request (by its key) or an adapter (by its digest)."""

    kind: PageKind
    name: int | str


def page_runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Splits page ids into maximal runs of neighbours that follow each other, as (index of the first, length)."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield start, i - start
            start = i


class PagePool:
    """Hands out pages, the tightest free run that fits first, so that what is freed is reused and large runs stay whole."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page; num_pages is {num_pages}")
        self._num_pages = num_pages
        self._owners: dict[int, PageOwner] = {}
        self._num_held = dict.fromkeys(PageKind, 0)
        # The free runs three times: lengths by first page, first pages by the page after the run, and both sorted by length.
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self._add_run(0, num_pages)

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_pages - len(self._owners)

    def num_held(self, kind: PageKind) -> int:
        """Pages that hold this."""
        return self._num_held[kind]

    def allocate(self, num_pages: int, owner: PageOwner) -> tuple[int, ...] | None:
        """Gives `owner` that many pages, one contiguous run if there is one, or None and no page at all."""
        if num_pages > self.num_free:
            return None
        pages: list[int] = []
        while len(pages) < num_pages:
            start, length = self._choose_run(num_pages - len(pages))
            pages.extend(range(start, start + length))
        for page in pages:
            self._owners[page] = owner
        self._num_held[owner.kind] += len(pages)
        return tuple(pages)

    def free(self, pages: Sequence[int], owner: PageOwner) -> None:
        """Takes the pages back from the owner that was given them."""
        for page in pages:
            held_by = self._owners.pop(page, None)
            assert held_by == owner, f"page {page} is freed by {owner} but held by {held_by}"
        self._num_held[owner.kind] -= len(pages)
        ordered = sorted(pages)
        for first, length in page_runs(ordered):
            self._merge_run(ordered[first], length)

    def check_integrity(self) -> None:
        """Asserts that free, KV and adapter pages add up, that no page is both held and free, and that the indexes agree."""
        free: set[int] = set()
        for start, length in self._length_at.items():
            run = range(start, start + length)
            assert free.isdisjoint(run), f"free run {start}+{length} overlaps another"
            free.update(run)
            assert start + length not in self._length_at, f"free runs meet at page {start + length} but are not merged"
        kinds = {kind: 0 for kind in PageKind}
        for owner in self._owners.values():
            kinds[owner.kind] += 1
        assert kinds == self._num_held, f"held pages by kind are {kinds}, counted {self._num_held}"
        assert free.isdisjoint(self._owners), f"pages both free and held: {sorted(free & self._owners.keys())[:8]}"
        total = len(free) + sum(kinds.values())
        assert total == self._num_pages, f"{len(free)} free + {kinds} pages are {total} of {self._num_pages}"
        assert not free or (min(free) >= 0 and max(free) < self._num_pages), "a free page lies outside the pool"
        assert sorted((length, start) for start, length in self._length_at.items()) == self._by_length
        assert {start + length: start for start, length in self._length_at.items()} == self._start_before

    def _choose_run(self, num_pages: int) -> tuple[int, int]:
        """Cuts off the tightest run that holds that many pages, else takes the longest run whole."""
        index = min(bisect_left(self._by_length, (num_pages, 0)), len(self._by_length) - 1)
        length, start = self._by_length[index]
        taken = min(length, num_pages)
        self._remove_run(start)
        if taken < length:
            self._add_run(start + taken, length - taken)
        return start, taken

    def _merge_run(self, start: int, length: int) -> None:
        before = self._start_before.get(start)
        if before is not None:
            length += self._remove_run(before)
            start = before
        if start + length in self._length_at:
            length += self._remove_run(start + length)
        self._add_run(start, length)

    def _add_run(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))

    def _remove_run(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length
