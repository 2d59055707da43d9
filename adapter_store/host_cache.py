"""Adapter images in host memory, in an arena of fixed size, read straight into it from the store by worker threads.

Knows nothing about devices or requests; who needs an image beyond its stay here keeps the object `get` returned, and with it
the image's place in the arena.
"""

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from adapter_store.errors import AdapterStoreError, StoreFullError
from adapter_store.geometry import BaseGeometry
from adapter_store.host_arena import HostArena
from adapter_store.image import AdapterImage
from adapter_store.image_store import ImageStore

_log = logging.getLogger(__name__)

FetchDone = Callable[[str, AdapterImage | Exception], None]

# Fetches of distinct digests that may wait; a queue this long means that the caller prefetches without a plan.
MAX_PENDING_FETCHES = 4096


class HostCache:
    """Images by digest, of which the least recently used go when there is no room, but none that is in use. Thread-safe."""

    def __init__(
        self,
        store: ImageStore,
        geometry: BaseGeometry,
        capacity_bytes: int,
        num_workers: int = 2,
        pin_memory: bool = False,
        on_evict: Callable[[str], None] | None = None,
    ) -> None:
        """pin_memory: page-locked images, for fast copies to a CUDA device. on_evict: told of each digest that was evicted.

        Raises:
            HostMemoryError: there is not so much memory.
        """
        self._arena = HostArena(capacity_bytes, pin_memory)
        self._store = store
        self._geometry = geometry
        self._capacity_bytes = capacity_bytes
        self._on_evict = on_evict
        self._lock = threading.Lock()
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()
        self._size_bytes = 0
        self._waiting: dict[str, list[FetchDone]] = {}
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="adapter-fetch")
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the cached images."""
        with self._lock:
            return self._size_bytes

    @property
    def capacity_bytes(self) -> int:
        """The bound that `size_bytes` never exceeds."""
        return self._capacity_bytes

    def digests(self) -> tuple[str, ...]:
        """What is cached, least recently used first."""
        with self._lock:
            return tuple(self._images)

    def get(self, digest: str) -> AdapterImage | None:
        """The cached image, now the most recently used; None if it is not cached."""
        with self._lock:
            if digest in self._images:
                self._images.move_to_end(digest)
            return self._images.get(digest)

    def fetch(self, digest: str, on_done: FetchDone) -> None:
        """Brings an image here and calls on_done(digest, image or error) once, from a worker thread.

        Fetches of one digest share one read. Past MAX_PENDING_FETCHES, and after `close`, on_done gets a StoreFullError at
        once, from the calling thread.
        """
        with self._lock:
            waiters = self._waiting.get(digest)
            if waiters is not None:
                waiters.append(on_done)
                return
            refusal = self._refusal()
            if refusal is None:
                self._waiting[digest] = [on_done]
                self._workers.submit(self._run_fetch, digest)
                return
        on_done(digest, refusal)

    def check_integrity(self) -> None:
        """Asserts that the books are right: sizes add up, all images lie in the arena, and the bound holds."""
        with self._lock:
            total = sum(image.size_bytes for image in self._images.values())
            assert total == self._size_bytes, f"images hold {total} bytes, the books say {self._size_bytes}"
            assert total <= self._capacity_bytes, f"{total} bytes cached over the bound of {self._capacity_bytes}"
            assert all(self._arena.holds(image.pages) for image in self._images.values()), "an image lies outside the arena"
            self._arena.check_integrity()

    def close(self) -> None:
        """Ends the workers. Fetches that have not begun are forgotten, those under way finish first."""
        with self._lock:
            self._closed = True
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _refusal(self) -> StoreFullError | None:
        """Why no new read may start now."""
        if self._closed:
            return StoreFullError("host cache", "it is closed")
        if len(self._waiting) >= MAX_PENDING_FETCHES:
            return StoreFullError("host cache", f"{len(self._waiting)} fetches wait already; the limit is {MAX_PENDING_FETCHES}")
        return None

    def _run_fetch(self, digest: str) -> None:
        """One read, on a worker thread."""
        result = self.get(digest) or self._read(digest)
        with self._lock:
            waiters = self._waiting.pop(digest)
            if isinstance(result, AdapterImage):
                self._insert(result)
        for on_done in waiters:
            try:
                on_done(digest, result)
            except Exception:
                # One waiter's bug must not cost the others their image.
                _log.exception("fetch callback failed digest=%s", digest)

    def _read(self, digest: str) -> AdapterImage | Exception:
        """What the store has, errors as values: they travel to the waiters, not up this thread.

        Without their tracebacks, whose frames would hold the buffer that was read into.
        """
        try:
            return self._store.read(digest, self._geometry, self._allocate)
        except AdapterStoreError as error:
            return error.with_traceback(None)
        except Exception as error:
            _log.exception("reading an adapter image failed digest=%s", digest)
            return error.with_traceback(None)

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        """A buffer in the arena, for which the least recently used images go; ordinary memory if they do not make room."""
        with self._lock:
            evicted: list[str] = []
            buffer = self._arena.allocate(size_bytes)
            candidates = iter(tuple(self._images) if size_bytes <= self._capacity_bytes else ())
            while buffer is None and (digest := next(candidates, None)) is not None:
                if self._evict(digest):
                    evicted.append(digest)
                    buffer = self._arena.allocate(size_bytes)
        for digest in evicted:
            if self._on_evict is not None:
                self._on_evict(digest)
        if buffer is not None:
            return buffer
        _log.warning("no room in the host cache, its copy will be slow size_bytes=%d cache=%d", size_bytes, self._capacity_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    def _evict(self, digest: str) -> bool:
        """Drops an image; not one that somebody holds, whose memory would not come free: it counts as used now."""
        image = self._images.pop(digest)
        size_bytes, reference = image.size_bytes, weakref.ref(image)
        del image
        held = reference()
        if held is not None:
            self._images[digest] = held
            return False
        self._size_bytes -= size_bytes
        return True

    def _insert(self, image: AdapterImage) -> None:
        """Caches an image, unless there was no room for it."""
        if not self._arena.holds(image.pages):
            return
        if self._images.pop(image.digest, None) is None:
            self._size_bytes += image.size_bytes
        self._images[image.digest] = image
