"""The adapters of a run: registered anew with random weights or from directories, or those that a service has already."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.model_shapes import ModelShape, geometry_of
from benchmarks.registering import TIMEOUT_S, dummy_requests, path_requests, register_all
from benchmarks.serving.grpc_driver import GrpcTarget
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc

_PAGE_SIZE = 1000
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
    if plan.directory is not None:
        requests = path_requests(sorted(path.parent for path in plan.directory.glob("*/adapter_config.json")))
    elif plan.ranks:
        requests = dummy_requests(plan.ranks, plan.modules, plan.count, plan.seed)
    else:
        return await _listed(target, channel), {}
    started_at = time.monotonic()
    done = await register_all(channel, requests, metadata=target.metadata)
    elapsed_s, count = time.monotonic() - started_at, len(done.times_s)
    return done.names, {"count": count, "elapsed_s": elapsed_s, "per_s": count / elapsed_s}


def total_bytes(shape: ModelShape, plan: AdapterPlan) -> int:
    """What all adapters of random weights take in host memory."""
    geometry = geometry_of(shape)
    row_elems = sum(m.in_features + m.out_features for m in geometry.modules if m.name in plan.modules)
    rows = sum(plan.ranks[i % len(plan.ranks)] for i in range(plan.count)) if plan.ranks else 0
    return rows * row_elems * geometry.num_layers * geometry.dtype_bytes


def host_cache_bytes(shape: ModelShape, plan: AdapterPlan, meminfo: Path = Path("/proc/meminfo")) -> int:
    """A host cache for all of them, as far as this machine has the memory; where that cannot be known, for all.

    It is taken at the start and page-locked for a GPU, which takes its time: many adapters of which few are asked for want less.
    """
    wanted = max(MIN_CACHE_BYTES, int(CACHE_SPARE * total_bytes(shape, plan)))
    # Not the free pages alone: a file's pages that are kept for another reader are given away when somebody needs them.
    found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE)
    return min(wanted, int(MAX_MEMORY_SHARE * 1024 * int(found[1]))) if found else wanted


async def _listed(target: GrpcTarget, channel: grpc.aio.Channel) -> list[str]:
    """Oldest first: in the order in which they were registered."""
    stub = pb_grpc.AdapterServiceStub(channel)
    names: list[str] = []
    page_token = ""
    while True:
        request = pb.ListAdaptersRequest(page_size=_PAGE_SIZE, page_token=page_token, order_by="create_time")
        answer = await stub.ListAdapters(request, timeout=TIMEOUT_S, metadata=target.metadata)
        names += [adapter.name for adapter in answer.adapters]
        page_token = answer.next_page_token
        if not page_token:
            return names


def check_count(names: Sequence[str], num_wanted: int) -> None:
    """Raises ValueError when there are fewer adapters than a run draws from."""
    if len(names) < num_wanted:
        raise ValueError(f"{num_wanted} adapters are asked for, and there are {len(names)}")
