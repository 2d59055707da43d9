"""The adapters whose pages can be taken at once, kept in the order in which they are. Evicts nothing itself."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from dataplane.memory.adapter_states import AdapterEntry

# What an adapter is worth, and a number that no two places share, so that entries themselves are never compared.
Place = tuple[float, int]


class IdleAdapters:
    """Adapters with pages, without a reference, not pinned. What is not wanted soon comes first, the least worth keeping first.

    An adapter's worth does not change while it is idle (AdapterEntry.worth), so each change costs one search, however many
    there are.
    """

    def __init__(self) -> None:
        self._entries: dict[str, AdapterEntry] = {}
        # Of the idle ones that are not wanted: where each stands, and all of them sorted.
        self._places: dict[str, Place] = {}
        self._order: list[tuple[float, int, AdapterEntry]] = []
        # Idle or not: how soon each wanted one is needed, 0 the soonest.
        self._wanted: dict[str, int] = {}
        self._num_pages = 0
        self._num_unwanted_pages = 0
        self._num_placed = 0

    @property
    def num_pages(self) -> int:
        """Pages that all of them hold."""
        return self._num_pages

    @property
    def num_unwanted_pages(self) -> int:
        """Pages of those that are not wanted soon."""
        return self._num_unwanted_pages

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(self._entries.values())

    def update(self, entry: AdapterEntry, is_idle: bool) -> None:
        """Puts an adapter in or takes it out. Its pages do not change while it is in."""
        was_idle = entry.digest in self._entries
        if is_idle and not was_idle:
            self._entries[entry.digest] = entry
            self._num_pages += len(entry.pages)
            if entry.digest not in self._wanted:
                self._place(entry)
        elif was_idle and not is_idle:
            del self._entries[entry.digest]
            self._num_pages -= len(entry.pages)
            self._displace(entry)

    def update_worth(self, entry: AdapterEntry) -> None:
        """Its worth has changed."""
        if entry.digest in self._places:
            self._displace(entry)
            self._place(entry)

    def set_wanted(self, digests: Sequence[str]) -> None:
        """Replaces the list of what will be needed soon, soonest first."""
        before = self._wanted
        self._wanted = {digest: i for i, digest in enumerate(digests)}
        for digest in before.keys() ^ self._wanted.keys():
            entry = self._entries.get(digest)
            if entry is None:
                continue
            if digest in self._wanted:
                self._displace(entry)
            else:
                self._place(entry)

    def next_unwanted(self) -> AdapterEntry | None:
        """The one least worth keeping of those that are not wanted soon."""
        return self._order[0][-1] if self._order else None

    def next_of_all(self) -> AdapterEntry | None:
        """The one to take first: while there is one that is not wanted that one, then the one that is needed latest."""
        if self._order or not self._entries:
            return self.next_unwanted()
        return max(self._entries.values(), key=lambda entry: self._wanted[entry.digest])

    def check_integrity(self) -> None:
        """Asserts that the counts and the order are those of the adapters."""
        unwanted = {digest: entry for digest, entry in self._entries.items() if digest not in self._wanted}
        assert self._num_pages == sum(len(entry.pages) for entry in self._entries.values())
        assert self._num_unwanted_pages == sum(len(entry.pages) for entry in unwanted.values())
        assert self._order == sorted((*self._places[digest], entry) for digest, entry in unwanted.items())
        assert len(self._places) == len(unwanted)
        stale = [entry.digest for worth, _, entry in self._order if worth != entry.worth]
        assert not stale, f"the worth of {stale} changed without a word"

    def _place(self, entry: AdapterEntry) -> None:
        self._num_placed += 1
        place = self._places[entry.digest] = (entry.worth, self._num_placed)
        insort(self._order, (*place, entry))
        self._num_unwanted_pages += len(entry.pages)

    def _displace(self, entry: AdapterEntry) -> None:
        place = self._places.pop(entry.digest, None)
        if place is not None:
            # A place alone sorts just before the same place with its entry.
            del self._order[bisect_left(self._order, place)]
            self._num_unwanted_pages -= len(entry.pages)
