"""A pool as large as the service's, pinned images of one adapter to copy into it, and pages to copy them to.

Knows nothing of results.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import BaseGeometry
from adapter_store.host_arena import HostArena
from adapter_store.image import TORCH_DTYPES, AdapterImage
from benchmarks.device_timing import Times
from dataplane.memory.adapter_copy import TensorCopier

# Copied from one after the other, so that none is read out of the processor's caches.
ROTATION_BYTES = 1 << 30
MAX_ROTATION = 32
NUM_REPEATS = 25


@dataclass(frozen=True, slots=True)
class LoadTimes(Times):
    """Of one load. host_us: of the call that starts it."""

    host_us: float


class LoadBench:
    """Loads of adapters of one shape."""

    def __init__(self, geometry: BaseGeometry, arena: HostArena, pool_share: float = 0.6) -> None:
        """pool_share: of the device memory that is free, for the pool."""
        self.geometry = geometry
        self.num_pages = int(torch.cuda.mem_get_info()[0] * pool_share) // geometry.page_bytes - 1
        shape = (geometry.num_layers, self.num_pages + 1, geometry.page_elems)
        self.pool = torch.empty(shape, dtype=TORCH_DTYPES[geometry.dtype], device="cuda")
        self.copier = TensorCopier(self.pool)
        self._arena = arena
        self._random = random.Random(0)

    def images(self, rank: int, modules: Sequence[str]) -> list[AdapterImage]:
        """Pinned images of one and the same adapter, each in memory of its own."""
        image = build_dummy(DummyAdapter(rank, tuple(modules), seed=rank), self.geometry)
        count = max(2, min(MAX_ROTATION, ROTATION_BYTES // image.size_bytes))
        return [replace(image, pages=self._pinned(image.pages)) for _ in range(count)]

    def contiguous(self, num_pages: int) -> list[int]:
        """Pages in one run, somewhere."""
        first = self._random.randrange(self.num_pages - num_pages + 1)
        return list(range(first, first + num_pages))

    def scattered(self, num_pages: int) -> list[int]:
        """Pages of which no two are neighbours."""
        return self._random.sample(range(0, self.num_pages, 2), num_pages)

    def time_loads(self, images: Sequence[AdapterImage], pages_of: Callable[[int], list[int]]) -> LoadTimes:
        """One load at a time on an idle device, from the call to the end of the copy as the host sees it."""
        times, host = [], []
        for i in range(NUM_REPEATS + 3):
            image, pages = images[i % len(images)], pages_of(images[0].num_pages)
            torch.cuda.synchronize()
            start = time.perf_counter()
            copy = self.copier.start(image, pages)
            started = time.perf_counter()
            copy.wait()
            times.append((time.perf_counter() - start) * 1e3)
            host.append((started - start) * 1e6)
        self._check(images[0], pages_of(images[0].num_pages))
        times, host = times[3:], host[3:]
        return LoadTimes(statistics.median(times), min(times), max(times), statistics.median(host))

    def loads_per_s(self, images: Sequence[AdapterImage], pages_of: Callable[[int], list[int]]) -> float:
        """Loads back to back, without waiting for one before the next."""
        count = max(8, min(64, ROTATION_BYTES // images[0].size_bytes))
        places = [pages_of(images[0].num_pages) for _ in range(count)]
        rates = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            copies = [self.copier.start(images[i % len(images)], pages) for i, pages in enumerate(places)]
            copies[-1].wait()
            rates.append(count / (time.perf_counter() - start))
        return statistics.median(rates)

    def time_plain(self, images: Sequence[AdapterImage]) -> float:
        """The same bytes in one piece, by torch, waited for in the same way; in milliseconds."""
        target = torch.empty_like(images[0].pages, device="cuda")
        times = []
        for i in range(NUM_REPEATS + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(images[i % len(images)].pages, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
            done.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[3:])

    def _check(self, image: AdapterImage, pages: list[int]) -> None:
        self.pool[:, pages] = 0
        self.copier.start(image, pages).wait()
        assert torch.equal(self.pool[:, pages].cpu(), image.pages), f"rank {image.header.rank} did not arrive as it was sent"

    def _pinned(self, pages: torch.Tensor) -> torch.Tensor:
        buffer = self._arena.allocate(pages.numel() * pages.element_size())
        assert buffer is not None, "the arena was made too small"
        return buffer.view(pages.dtype).view(pages.shape).copy_(pages)


def plain_gb_per_s(source: torch.Tensor) -> float:
    """Of one large copy from pinned memory, in one piece."""
    target = torch.empty_like(source, device="cuda")
    rates = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(source.numel() * source.element_size() / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)
