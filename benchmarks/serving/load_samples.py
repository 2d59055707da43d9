"""What the service says of its load while a run goes on: queues, the pool's pages by use, time spent in steps. Once a second."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from benchmarks.serving.grpc_driver import GrpcTarget
from protos.loraplane.v1 import system_pb2, system_pb2_grpc

_RPC_TIMEOUT_S = 30.0
_IDLE_POLL_S = 0.05
# Looks that are all alike.
_NUM_SETTLED = 5


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One answer, all data planes together. t_s: time.monotonic when it came; the pages are those of PoolUsage."""

    t_s: float
    kv_pages: int
    adapter_pages: int
    idle_adapter_pages: int
    free_pages: int
    num_running: int
    num_waiting: int
    num_resident: int
    num_steps: int
    step_s: float


class LoadSampler:
    """Asks one service."""

    def __init__(self, target: GrpcTarget, channel: grpc.aio.Channel) -> None:
        self._stub = system_pb2_grpc.SystemServiceStub(channel)
        self._metadata = target.metadata

    async def info(self) -> system_pb2.GetServerInfoResponse:
        """What is served."""
        request = system_pb2.GetServerInfoRequest()
        answer: system_pb2.GetServerInfoResponse = await self._stub.GetServerInfo(
            request, timeout=_RPC_TIMEOUT_S, metadata=self._metadata
        )
        return answer

    async def sample(self) -> LoadSample:
        """How busy it is now."""
        load = await self._stub.GetLoad(system_pb2.GetLoadRequest(), timeout=_RPC_TIMEOUT_S, metadata=self._metadata)
        planes = load.data_planes
        return LoadSample(
            t_s=time.monotonic(),
            kv_pages=sum(plane.pool.kv_pages for plane in planes),
            adapter_pages=sum(plane.pool.adapter_pages for plane in planes),
            idle_adapter_pages=sum(plane.pool.idle_adapter_pages for plane in planes),
            free_pages=sum(plane.pool.free_pages for plane in planes),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_resident=sum(len(plane.adapters) for plane in planes),
            num_steps=sum(plane.num_steps for plane in planes),
            step_s=sum(plane.step_time.ToTimedelta().total_seconds() for plane in planes),
        )

    async def wait_idle(self, timeout_s: float) -> None:
        """Until nothing runs or waits, and no adapter has come to the device or left it for a moment.

        Raises:
            TimeoutError: that never happened.
        """
        give_up_at = time.monotonic() + timeout_s
        num_settled, before = 0, -1
        while num_settled < _NUM_SETTLED:
            sample = await self.sample()
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"the service is not idle after {timeout_s:g} s: {sample}")
            is_idle = not (sample.num_running or sample.num_waiting or sample.kv_pages)
            num_settled = num_settled + 1 if is_idle and sample.num_resident == before else 0
            before = sample.num_resident
            await asyncio.sleep(_IDLE_POLL_S)

    @asynccontextmanager
    async def sampling(self, interval_s: float) -> AsyncIterator[list[LoadSample]]:
        """Samples are added to the list while the context is open: one at the start, one each interval, one at the end."""
        samples = [await self.sample()]

        async def go_on() -> None:
            while True:
                await asyncio.sleep(interval_s)
                # A service that is too busy to answer is measured all the same.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    samples.append(await self.sample())

        asking = asyncio.create_task(go_on())
        try:
            yield samples
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        samples.append(await self.sample())


def summarize(samples: list[LoadSample], start_at: float, wall_s: float, max_samples: int = 120) -> dict[str, Any]:
    """The samples as columns, and what the first and the last say of the whole run. start_at: zero of the columns' time.

    engine_busy_share: of the time from zero to the end of the last stream, how much the engine spent in steps (one that waits
    for the device is in a step).
    """
    first, last = samples[0], samples[-1]
    num_steps, step_s = last.num_steps - first.num_steps, last.step_s - first.step_s
    kept = samples[:: -(-len(samples) // max_samples)]
    columns = ("kv_pages", "adapter_pages", "idle_adapter_pages", "free_pages", "num_running", "num_waiting", "num_resident")
    return {
        "num_steps": num_steps,
        "mean_step_s": step_s / num_steps if num_steps else 0.0,
        "engine_busy_share": step_s / wall_s if wall_s else 0.0,
        "num_resident_before": first.num_resident,
        "max_running": max(sample.num_running for sample in samples),
        "samples": {
            "t_s": [round(sample.t_s - start_at, 2) for sample in kept],
            **{name: [getattr(sample, name) for sample in kept] for name in columns},
        },
    }
