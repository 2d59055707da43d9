"""Registers adapters in bulk through the admin RPC, so many at a time: of random weights, or from directories."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc

TIMEOUT_S = 120.0
CONCURRENCY = 16
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Registered:
    """What was registered: all names in order; of those that are new, seconds of each call, and bytes of all images."""

    names: list[str]
    times_s: list[float]
    size_bytes: int


def dummy_requests(
    ranks: Sequence[int], modules: Sequence[str], count: int, seed: int = 0, name_template: str = "adapter-{i}"
) -> list[pb.RegisterAdapterRequest]:
    """Adapters of random weights, numbered from 0: number i has the rank that is i-th in turn, and weights of seed and i."""
    return [
        pb.RegisterAdapterRequest(
            name=name_template.format(i=i),
            # Seeds of one run never meet those of another.
            source=pb.AdapterSource(
                dummy=pb.DummyAdapter(rank=ranks[i % len(ranks)], target_modules=modules, seed=(seed << 32) + i)
            ),
        )
        for i in range(count)
    ]


def path_requests(directories: Iterable[Path]) -> list[pb.RegisterAdapterRequest]:
    """PEFT directories under their own names."""
    return [pb.RegisterAdapterRequest(name=path.name, source=pb.AdapterSource(path=str(path.resolve()))) for path in directories]


async def register_all(
    channel: grpc.aio.Channel,
    requests: Sequence[pb.RegisterAdapterRequest],
    concurrency: int = CONCURRENCY,
    metadata: Metadata = (),
) -> Registered:
    """Registers them all. One whose name is taken already is left as it is, so that a service can be used again.

    Raises:
        grpc.aio.AioRpcError: the first that was refused; what had not been sent by then is not registered.
    """
    stub = pb_grpc.AdapterServiceStub(channel)
    waiting = iter(requests)
    times_s: list[float] = []
    sizes: list[int] = []

    async def register_some() -> None:
        for request in waiting:
            started_at = time.perf_counter()
            try:
                answer = await stub.RegisterAdapter(request, timeout=TIMEOUT_S, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
                continue
            times_s.append(time.perf_counter() - started_at)
            sizes.append(answer.adapter.current.size_bytes)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(requests))):
                tasks.create_task(register_some())
    except ExceptionGroup as refused:
        raise refused.exceptions[0] from None
    return Registered([request.name for request in requests], times_s, sum(sizes))
