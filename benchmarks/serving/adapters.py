"""The adapters of a run: registered anew with random weights or from directories, or those that a service has already."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.model_shapes import ModelShape
from benchmarks.serving.grpc_driver import GrpcTarget
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc

_RPC_TIMEOUT_S = 120.0
_PAGE_SIZE = 1000
_CONCURRENCY = 16
BYTES_PER_ELEM = 2
# Of the data plane's host cache: beside the adapters themselves, at the least, and of the memory that is free.
CACHE_SPARE, MIN_CACHE_BYTES, MAX_MEMORY_SHARE = 1.05, 256 << 20, 0.6


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Where adapters come from. ranks: random weights, of these ranks in turn. directory: every PEFT directory in it, by path.

    With neither, those that the service has.
    """

    count: int
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    seed: int = 0
    directory: Path | None = None


async def provide_adapters(target: GrpcTarget, channel: grpc.aio.Channel, plan: AdapterPlan) -> tuple[list[str], dict[str, Any]]:
    """The names, in the order of their numbers, and what registering them took."""
    if not plan.ranks and plan.directory is None:
        return await _listed(target, channel), {}
    started = time.monotonic()
    if plan.directory is not None:
        names = await _register_directories(target, channel, plan.directory)
    else:
        # Here and not above: it brings torch, which the client processes do without.
        from benchmarks.dummy_adapters import register_dummy_adapters

        names = await register_dummy_adapters(channel, plan.ranks, plan.modules, plan.count, plan.seed, _CONCURRENCY)
    elapsed_s = time.monotonic() - started
    return names, {"count": len(names), "elapsed_s": elapsed_s, "per_s": len(names) / elapsed_s}


def total_bytes(shape: ModelShape, plan: AdapterPlan) -> int:
    """What all adapters of random weights take in host memory."""
    hidden, ffn, kv_dim = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    out_features = {"k_proj": kv_dim, "v_proj": kv_dim, "gate_proj": ffn, "up_proj": ffn}
    row_elems = sum((ffn if name == "down_proj" else hidden) + out_features.get(name, hidden) for name in plan.modules)
    rows = sum(plan.ranks[i % len(plan.ranks)] for i in range(plan.count)) if plan.ranks else 0
    return rows * row_elems * shape.num_layers * BYTES_PER_ELEM


def host_cache_bytes(shape: ModelShape, plan: AdapterPlan, meminfo: Path = Path("/proc/meminfo")) -> int:
    """A host cache for all of them, as far as this machine has the memory; where that cannot be known, for all.

    It is taken at the start and page-locked for a GPU, which takes its time: many adapters of which few are asked for want less.
    """
    wanted = max(MIN_CACHE_BYTES, int(CACHE_SPARE * total_bytes(shape, plan)))
    # Not the free pages alone: a file's pages that are kept for another reader are given away when somebody needs them.
    found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE)
    return min(wanted, int(MAX_MEMORY_SHARE * 1024 * int(found[1]))) if found else wanted


async def _register_directories(target: GrpcTarget, channel: grpc.aio.Channel, directory: Path) -> list[str]:
    stub = pb_grpc.AdapterServiceStub(channel)
    paths = sorted(path.parent.resolve() for path in directory.glob("*/adapter_config.json"))

    async def register(path: Path) -> None:
        request = pb.RegisterAdapterRequest(name=path.name, source=pb.AdapterSource(path=str(path)))
        await stub.RegisterAdapter(request, timeout=_RPC_TIMEOUT_S, metadata=target.metadata)

    await asyncio.gather(*(register(path) for path in paths))
    return [path.name for path in paths]


async def _listed(target: GrpcTarget, channel: grpc.aio.Channel) -> list[str]:
    """Oldest first: in the order in which they were registered."""
    stub = pb_grpc.AdapterServiceStub(channel)
    names: list[str] = []
    page_token = ""
    while True:
        request = pb.ListAdaptersRequest(page_size=_PAGE_SIZE, page_token=page_token, order_by="create_time")
        answer = await stub.ListAdapters(request, timeout=_RPC_TIMEOUT_S, metadata=target.metadata)
        names += [adapter.name for adapter in answer.adapters]
        page_token = answer.next_page_token
        if not page_token:
            return names


def check_count(names: Sequence[str], num_wanted: int) -> None:
    """Raises ValueError when there are fewer adapters than a run draws from."""
    if len(names) < num_wanted:
        raise ValueError(f"{num_wanted} adapters are asked for, and there are {len(names)}")
