"""How fast images come out of the store into pinned memory: one at a time, and by the threads of the host cache."""

import statistics
import time
from functools import partial
from pathlib import Path
from queue import Queue

import torch

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import BaseGeometry
from adapter_store.host_arena import HostArena
from adapter_store.host_cache import HostCache
from adapter_store.image import AdapterImage
from adapter_store.image_store import ImageStore

NUM_IMAGES = 16


def measure_reads(
    directory: Path, geometry: BaseGeometry, rank: int, modules: tuple[str, ...], num_threads: int
) -> dict[str, float]:
    """Of images that the system has in its page cache: it has just written them. Reading verifies the digest."""
    store = ImageStore(directory)
    digests = [store.publish(build_dummy(DummyAdapter(rank, modules, seed), geometry)) for seed in range(NUM_IMAGES)]
    size_bytes = store.read_header(digests[0]).size_bytes
    arena = HostArena(2 * size_bytes, pin_memory=True)
    times = []
    for digest in digests:
        start = time.perf_counter()
        image = store.read(digest, geometry, partial(_allocate, arena))
        times.append(time.perf_counter() - start)
        del image
    read_s = statistics.median(times)
    return {
        "rank": rank,
        "bytes": size_bytes,
        "read_ms": read_s * 1e3,
        "read_gb_per_s": size_bytes / read_s / 1e9,
        "threads": num_threads,
        "fetches_per_s": _fetches_per_s(store, digests, geometry, size_bytes, num_threads),
    }


def _allocate(arena: HostArena, size_bytes: int) -> torch.Tensor:
    buffer = arena.allocate(size_bytes)
    assert buffer is not None, "the last image was not let go"
    return buffer


def _fetches_per_s(store: ImageStore, digests: list[str], geometry: BaseGeometry, size_bytes: int, num_threads: int) -> float:
    """By the host cache, all asked for at once."""
    cache = HostCache(store, geometry, len(digests) * size_bytes, num_threads, pin_memory=True)
    done: Queue[AdapterImage | Exception] = Queue()
    start = time.perf_counter()
    for digest in digests:
        cache.fetch(digest, lambda _, result: done.put(result))
    results = [done.get() for _ in digests]
    rate = len(digests) / (time.perf_counter() - start)
    assert all(isinstance(result, AdapterImage) for result in results), results
    cache.close()
    return rate
