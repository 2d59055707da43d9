"""Watches a data plane during a soak: how full its pool is, and the adapters that come and go. Asks for nothing to be done."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from benchmarks.soak.service import SoakService
from protos.planes import PoolCounts

PERIOD_S = 0.005
# Parts of the time for which the mean fill is reported.
NUM_PARTS = 10


@dataclass(slots=True)
class PoolWatch:
    """One look every few milliseconds at what the latest report of a step said."""

    num_pages: int
    samples: list[tuple[int, PoolCounts]] = field(default_factory=list)
    num_loads: int = 0
    num_evictions: int = 0
    seconds: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0

    def summary(self) -> dict[str, object]:
        """For the result file. Shares are of all looks; loads and evictions those that a look could see."""
        pools = [pool for _, pool in self.samples]
        part = max(1, -(-len(pools) // NUM_PARTS))
        return {
            "seconds": self.seconds,
            "steps": self.num_steps,
            "steps_per_s": self.num_steps / self.seconds,
            "preemptions": self.num_preemptions,
            "adapter_loads": self.num_loads,
            "adapter_evictions": self.num_evictions,
            "share_no_page_free": _share(pool.free_pages == 0 for pool in pools),
            "share_no_page_free_or_idle": _share(pool.free_pages + pool.idle_adapter_pages == 0 for pool in pools),
            "least_free_or_idle_pages": min(pool.free_pages + pool.idle_adapter_pages for pool in pools),
            "mean_requests": statistics.mean(num_running for num_running, _ in self.samples),
            "mean_share_kv": statistics.mean(pool.kv_pages for pool in pools) / self.num_pages,
            "mean_share_adapters_in_use": statistics.mean(p.adapter_pages - p.idle_adapter_pages for p in pools) / self.num_pages,
            "mean_share_adapters_idle": statistics.mean(pool.idle_adapter_pages for pool in pools) / self.num_pages,
            "fill_over_time": [
                round(1 - statistics.mean(pool.free_pages for pool in pools[i : i + part]) / self.num_pages, 4)
                for i in range(0, len(pools), part)
            ],
        }


@asynccontextmanager
async def watch_pool(service: SoakService, num_pages: int) -> AsyncIterator[PoolWatch]:
    """Looks while the context is open."""
    watch = PoolWatch(num_pages)
    started_at, before = time.monotonic(), service.load()
    task = asyncio.create_task(_look(service, watch))
    try:
        yield watch
    finally:
        task.cancel()
        after = service.load()
        watch.seconds = time.monotonic() - started_at
        watch.num_steps = after.num_steps - before.num_steps
        watch.num_preemptions = after.num_preemptions - before.num_preemptions


async def _look(service: SoakService, watch: PoolWatch) -> None:
    resident = {adapter.digest for adapter in service.load().adapters}
    while True:
        load = service.load()
        watch.samples.append((load.num_running, load.pool))
        now = {adapter.digest for adapter in load.adapters}
        watch.num_loads += len(now - resident)
        watch.num_evictions += len(resident - now)
        resident = now
        await asyncio.sleep(PERIOD_S)


def _share(flags: Iterable[bool]) -> float:
    return statistics.mean(flags)
