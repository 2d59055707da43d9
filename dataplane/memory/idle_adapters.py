"""The adapters whose pages can be taken at once, and the order in which they are. Evicts nothing itself."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from dataplane.memory.adapter_states import AdapterEntry


class IdleAdapters:
    """Adapters with pages, without a reference, not pinned; their pages are counted as they come and go."""

    def __init__(self) -> None:
        self._entries: dict[str, AdapterEntry] = {}
        self._num_pages = 0

    @property
    def num_pages(self) -> int:
        """Pages that all of them hold."""
        return self._num_pages

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
        elif was_idle and not is_idle:
            del self._entries[entry.digest]
            self._num_pages -= len(entry.pages)

    def others(self, digests: Collection[str]) -> list[AdapterEntry]:
        """All but these."""
        return [entry for digest, entry in self._entries.items() if digest not in digests]


def eviction_order(
    candidates: Iterable[AdapterEntry], wanted: Sequence[str], on_host: Collection[str], now: float
) -> list[AdapterEntry]:
    """First what is not wanted soon, then what is wanted latest; among equals the lowest score.

    wanted: digests, soonest first. on_host: whose reload costs a copy and no read of the store.
    """
    soonness = {digest: len(wanted) - i for i, digest in enumerate(wanted)}

    def keep(entry: AdapterEntry) -> tuple[int, float]:
        return soonness.get(entry.digest, 0), entry.score(now, entry.digest in on_host)

    return sorted(candidates, key=keep)
