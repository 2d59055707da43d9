"""Which adapters are where on this data plane: fetches, copies into pages, reference counts, prefetch and eviction.

Owns the entries and the adapters' pages; knows nothing of requests beyond counts. Only the engine's thread calls it.
Longer than most files here: every way in and out of the device must keep the same books.
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from adapter_store.image import AdapterImage
from dataplane.memory.adapter_copy import AdapterCopier
from dataplane.memory.adapter_states import PLACES, AdapterEntry, AdapterState, Readiness
from dataplane.memory.host_images import FetchResult, HostImages
from dataplane.memory.idle_adapters import IdleAdapters
from dataplane.memory.page_pool import PageKind, PagePool
from kernels.lora import LoraAdapter
from protos.planes import AdapterEvent

# Reads of the store and copies on their way past which none is begun that no request waits for: one that a request waits for
# queues behind them.
MAX_FETCHES_AHEAD = 4
MAX_COPIES_AHEAD = 8
# Requests need not wait a step for copies of so many bytes: 1.3 ms at 50 GB/s, which pass while the step on its way computes.
MAX_JOINED_BYTES = 64 << 20


class Residency:
    """Brings adapters to the device for those who acquired them, keeps them there while it can, evicts only idle ones."""

    def __init__(
        self,
        pool: PagePool,
        host: HostImages,
        copier: AdapterCopier,
        on_fetched: Callable[[str, FetchResult], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_fetched: called from another thread when an image arrived; must lead to `complete_fetch` on the engine's."""
        self._pool = pool
        self._host = host
        self._copier = copier
        self._on_fetched = on_fetched
        self._clock = clock
        self._entries: dict[str, AdapterEntry] = {}
        self._idle = IdleAdapters()
        self._fetching: set[str] = set()
        # In the order in which the device copies them.
        self._copying: dict[str, AdapterEntry] = {}
        self._prefetch: tuple[str, ...] = ()
        self._pinned: dict[str, None] = {}
        # Prefetches fetched once each while listed, so that a host cache smaller than the list is not filled in circles.
        self._prefetched: set[str] = set()
        self._events: dict[str, AdapterEvent] = {}

    @property
    def num_idle_pages(self) -> int:
        """Pages that `reclaim` can give free."""
        return self._idle.num_pages

    def acquire(self, digest: str) -> None:
        """A request needs this adapter: it is fetched if need be, and not evicted until as many releases."""
        entry = self._entries.setdefault(digest, AdapterEntry(digest))
        entry.num_references += 1
        entry.add_use(self._clock())
        if entry.state is AdapterState.NONE:
            self._fetch(entry)
        self._update_idle(entry)

    def release(self, digest: str) -> None:
        """Gives back one reference. The adapter stays where it is until its room is wanted."""
        entry = self._entries[digest]
        assert entry.num_references > 0, f"adapter {digest} is released more often than acquired"
        entry.num_references -= 1
        if entry.num_references == 0:
            entry.image = None
            self._forget_if_gone(entry)
        self._update_idle(entry)

    def prepare(self, digest: str, may_allocate: bool) -> Readiness:
        """Moves an acquired adapter on towards the device, evicting idle ones for it. may_allocate: whether it may take pages."""
        entry = self._entries[digest]
        if entry.state is AdapterState.HOST:
            image = entry.image or self._host.get(digest)
            if image is None:
                self._fetch(entry)
            elif not may_allocate or not self._activate(entry, image):
                return Readiness.STARVED
        return Readiness.READY if entry.state is AdapterState.DEVICE else Readiness.LOADING

    def adapter(self, digest: str) -> LoraAdapter:
        """Where the rows of an adapter on the device lie."""
        entry = self._entries[digest]
        assert entry.state is AdapterState.DEVICE and entry.copy is not None, f"adapter {digest} is {entry.state.name}"
        return entry.copy.adapter

    def reclaim(self, num_pages: int) -> bool:
        """Evicts idle adapters until that many pages are free; evicts none if it would not suffice."""
        if self._pool.num_free + self._idle.num_pages < num_pages:
            return False
        while self._pool.num_free < num_pages:
            self._evict(self._idle.next_of_all())
        return True

    def set_prefetch(self, digests: Sequence[str]) -> None:
        """Replaces the list of adapters that will be needed soon, soonest first."""
        self._prefetch = tuple(dict.fromkeys(digests))
        self._idle.set_wanted(self._prefetch)
        self._prefetched.intersection_update(chain(self._prefetch, self._pinned))

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Replaces the list of adapters that are never evicted; they are loaded when memory allows."""
        before = self._pinned
        self._pinned = dict.fromkeys(digests)
        self._prefetched.intersection_update(chain(self._prefetch, self._pinned))
        for digest in before.keys() | self._pinned.keys():
            if digest in self._entries:
                self._update_idle(self._entries[digest])

    def advance_prefetch(self, num_reserved_pages: int) -> None:
        """Fetches what is wanted soon, and copies it to the device where that leaves the reserved pages free.

        Evicts only what is idle and not wanted itself. After the first that finds no room nothing is copied, for it is wanted
        soonest; the rest is still fetched. Neither is begun while too many are on their way, for whomever.
        """
        has_room = True
        for digest in chain(self._prefetch, self._pinned):
            entry = self._entries.get(digest)
            if entry is None and digest not in self._prefetched and len(self._fetching) < MAX_FETCHES_AHEAD:
                entry = self._entries.setdefault(digest, AdapterEntry(digest))
                self._prefetched.add(digest)
                self._fetch(entry)
            if entry is None or entry.state is not AdapterState.HOST:
                continue
            if has_room and len(self._copying) < MAX_COPIES_AHEAD:
                image = entry.image or self._host.get(digest)
                has_room = image is None or self._activate_ahead(entry, image, num_reserved_pages)

    def complete_fetch(self, digest: str, result: FetchResult) -> str | None:
        """An image arrived, or did not. Returns what is wrong with the adapter, None if it can be used."""
        entry = self._entries.get(digest)
        if entry is None or entry.state is not AdapterState.FETCHING:
            return None
        self._fetching.remove(digest)
        if isinstance(result, AdapterImage):
            error = self._misfit(result)
            entry.size_bytes = result.size_bytes
        else:
            error = str(result) or type(result).__name__
        if error is not None:
            entry.error = error
            self._move(entry, AdapterState.FAILED)
            self._forget_if_gone(entry)
            return error
        self._move(entry, AdapterState.HOST)
        # Held beside the host cache, which may evict it meanwhile: bounded by the number of admitted requests.
        entry.image = result if entry.num_references and isinstance(result, AdapterImage) else None
        self._forget_if_gone(entry)
        return None

    def complete_host_eviction(self, digest: str) -> None:
        """The host cache evicted this image some time ago."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        # It may be back by now.
        entry.is_on_host = self._host.get(digest) is not None
        self._idle.update_worth(entry)
        self._forget_if_gone(entry)

    def poll_copies(self) -> None:
        """Lets the adapters join whose copies are done, and those that requests wait for whose copies soon are: the device
        waits for these, after the step on its way."""
        num_bytes_ahead = 0
        for entry in tuple(self._copying.values()):
            assert entry.copy is not None
            if not entry.copy.is_done():
                num_bytes_ahead += entry.size_bytes
                if entry.num_references == 0 or num_bytes_ahead > MAX_JOINED_BYTES:
                    continue
                entry.copy.join()
            self._complete_copy(entry)

    def wait_for_copy(self) -> bool:
        """Blocks until the first of the copies on their way is done, for when there is nothing else to do. Returns whether there
        was one."""
        for entry in self._copying.values():
            assert entry.copy is not None
            entry.copy.wait()
            return True
        return False

    def take_events(self) -> tuple[AdapterEvent, ...]:
        """The last change of place of each adapter since this was last called."""
        events = tuple(self._events.values())
        self._events.clear()
        return events

    def snapshot(self) -> tuple[AdapterEvent, ...]:
        """Every adapter that is here or on its way."""
        return tuple(entry.event() for entry in self._entries.values())

    def check_integrity(self) -> None:
        """Asserts that entries, idle set and pages agree."""
        held = sum(len(entry.pages) for entry in self._entries.values())
        assert held == self._pool.num_held(PageKind.ADAPTER), "adapter pages of the entries and of the pool differ"
        idle = {digest for digest, entry in self._entries.items() if self._is_idle(entry)}
        counted = {entry.digest for entry in self._idle}
        assert idle == counted, f"idle adapters are {idle}, counted {counted}"
        self._idle.check_integrity()
        fetching = {digest for digest, entry in self._entries.items() if entry.state is AdapterState.FETCHING}
        assert fetching == self._fetching, f"adapters being fetched are {fetching}, counted {self._fetching}"
        for digest, entry in self._entries.items():
            on_device = entry.state in (AdapterState.COPYING, AdapterState.DEVICE)
            assert on_device == bool(entry.pages), f"adapter {digest} is {entry.state.name} with {len(entry.pages)} pages"
            assert (digest in self._copying) == (entry.state is AdapterState.COPYING)

    def _misfit(self, image: AdapterImage) -> str | None:
        if image.num_pages <= self._pool.num_pages:
            return None
        return f"adapter {image.digest} takes {image.num_pages} pages; the whole pool has {self._pool.num_pages}"

    def _fetch(self, entry: AdapterEntry) -> None:
        self._move(entry, AdapterState.FETCHING)
        self._fetching.add(entry.digest)
        self._host.fetch(entry.digest, self._on_fetched)

    def _activate_ahead(self, entry: AdapterEntry, image: AdapterImage, num_reserved_pages: int) -> bool:
        """Activates an adapter that nobody waits for yet, from room that nobody else wants."""
        num_needed = image.num_pages + num_reserved_pages
        if self._pool.num_free + self._idle.num_unwanted_pages < num_needed:
            return False
        while self._pool.num_free < num_needed:
            self._evict(self._idle.next_unwanted())
        return self._activate(entry, image)

    def _activate(self, entry: AdapterEntry, image: AdapterImage) -> bool:
        """Gives the adapter pages and starts its copy; False if there are no pages."""
        pages = self._pool.allocate(image.num_pages, entry.owner) if self.reclaim(image.num_pages) else None
        if pages is None:
            return False
        entry.pages = pages
        entry.is_on_host = self._host.get(entry.digest) is not None
        entry.copy = self._copier.start(image, pages)
        self._move(entry, AdapterState.COPYING)
        self._copying[entry.digest] = entry
        self._update_idle(entry)
        if entry.copy.is_done():
            self._complete_copy(entry)
        return True

    def _complete_copy(self, entry: AdapterEntry) -> None:
        del self._copying[entry.digest]
        entry.image = None
        self._move(entry, AdapterState.DEVICE)
        self._idle.update_worth(entry)

    def _evict(self, entry: AdapterEntry | None) -> None:
        """Takes an idle adapter off the device."""
        assert entry is not None, "an idle adapter is to be evicted, and there is none"
        if entry.state is AdapterState.COPYING:
            assert entry.copy is not None
            entry.copy.join()  # so that its pages can be given away at once
            del self._copying[entry.digest]
        self._pool.free(entry.pages, entry.owner)
        self._idle.update(entry, is_idle=False)
        entry.pages = ()
        entry.copy = None
        entry.is_on_host = self._host.get(entry.digest) is not None
        self._move(entry, AdapterState.HOST if entry.is_on_host else AdapterState.NONE)
        if not entry.is_on_host:
            del self._entries[entry.digest]

    def _forget_if_gone(self, entry: AdapterEntry) -> None:
        """Drops the entry of an adapter that nobody acquired and that is neither here nor coming."""
        if entry.num_references:
            return
        if entry.state is AdapterState.HOST and entry.image is None and self._host.get(entry.digest) is None:
            self._move(entry, AdapterState.NONE)
            del self._entries[entry.digest]
        elif entry.state is AdapterState.FAILED:
            # Not an event: that it failed is the last that the control plane should hear. The next admission tries again.
            del self._entries[entry.digest]

    def _is_idle(self, entry: AdapterEntry) -> bool:
        return bool(entry.pages) and entry.num_references == 0 and entry.digest not in self._pinned

    def _update_idle(self, entry: AdapterEntry) -> None:
        self._idle.update(entry, self._is_idle(entry))

    def _move(self, entry: AdapterEntry, state: AdapterState) -> None:
        before = PLACES[entry.state]
        entry.move(state)
        if state is not AdapterState.FAILED:
            entry.error = ""
        if PLACES[state] is not before:
            # Popped first, so that events stand in the order in which they happened.
            self._events.pop(entry.digest, None)
            self._events[entry.digest] = entry.event()
