"""Registered adapters that nobody has asked for yet: which of them a data plane brings in while it has pages to spare.

A request for one of them then finds it on the device instead of waiting for a file. Costs nobody anything: an adapter without
requests gives its pages back as soon as they are wanted.
"""

from itertools import islice

from protos.planes import AdapterEvent, AdapterPlace

# At a time. Fewer than a data plane reads at once, so that one that a request waits for need not queue behind them.
MAX_AT_ONCE = 3
# This share of the pool is left free, so that nothing is evicted for adapters that may never be used.
FREE_SHARE = 0.25


class IdlePrefetch:
    """Of one session with one data plane. Each adapter is brought in once: one that was evicted waits for its next request."""

    def __init__(self, num_pages: int) -> None:
        self._num_free_pages = int(FREE_SHARE * num_pages)
        self._absent: dict[str, int] = {}  # digest: pages

    def add(self, digest: str, num_pages: int) -> None:
        """It is registered, and not on the device."""
        self._absent[digest] = num_pages

    def discard(self, digest: str) -> None:
        """It is there, has been there, or is not wanted any more."""
        self._absent.pop(digest, None)

    def settle(self, event: AdapterEvent) -> None:
        """It moved: on its way it is still named."""
        if event.place not in (AdapterPlace.FETCHING, AdapterPlace.HOST):
            self.discard(event.digest)

    def next(self, free_pages: int) -> tuple[str, ...]:
        """What to bring in now, the longest registered first."""
        room = free_pages - self._num_free_pages
        chosen = []
        for digest, num_pages in islice(self._absent.items(), MAX_AT_ONCE):
            room -= num_pages
            if room < 0:
                break
            chosen.append(digest)
        return tuple(chosen)
