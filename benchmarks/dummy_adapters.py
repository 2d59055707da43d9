"""Adapters with random weights by the thousand: registers them through the admin RPC and says how many a second that makes.

`python -m benchmarks.dummy_adapters` starts a control plane of its own, beside a data plane that computes nothing; with --server
it fills a service that runs (started with --allow-dummy-adapters). Other benchmarks call `register_dummy_adapters`.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image_store import ImageStore
from benchmarks.model_shapes import LLAMA_7B, SHAPES, ModelShape
from benchmarks.null_data_plane import serve
from benchmarks.null_engine import NullConfig
from benchmarks.result_file import RESULTS, write_result
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc as pb_grpc

TIMEOUT_S = 120.0
START_TIMEOUT_S = 60.0
# For its tokenizer; the shape of the base is what the data plane says.
MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo" / "base"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Images made one after the other in this process, to tell where the time goes.
NUM_SOLO = 12
MIB = 1 << 20


async def register_dummy_adapters(
    channel: grpc.aio.Channel,
    ranks: Sequence[int],
    modules: Sequence[str],
    count: int,
    seed: int = 0,
    concurrency: int = 16,
    name_template: str = "adapter-{i}",
) -> list[str]:
    """Registers adapters 0 to count - 1, so many at a time; returns their names in order.

    Adapter i has the rank that is i-th in turn, and weights that follow from seed and i. One whose name is taken already is left
    as it is, so that a service can be used again.
    """
    return (await _register(channel, ranks, modules, count, seed, concurrency, name_template)).names


@dataclass(frozen=True, slots=True)
class Registered:
    """What was registered: the names in order, seconds of each call, and bytes of all images."""

    names: list[str]
    times_s: list[float]
    size_bytes: int


async def _register(
    channel: grpc.aio.Channel,
    ranks: Sequence[int],
    modules: Sequence[str],
    count: int,
    seed: int,
    concurrency: int,
    name_template: str,
) -> Registered:
    stub = pb_grpc.AdapterServiceStub(channel)
    names = [name_template.format(i=i) for i in range(count)]
    numbers = iter(range(count))
    times_s: list[float] = []
    sizes: list[int] = []

    async def register_some() -> None:
        for i in numbers:
            # Seeds of one run never meet those of another.
            dummy = pb.DummyAdapter(rank=ranks[i % len(ranks)], target_modules=modules, seed=(seed << 32) + i)
            request = pb.RegisterAdapterRequest(name=names[i], source=pb.AdapterSource(dummy=dummy))
            started = time.perf_counter()
            try:
                answer = await stub.RegisterAdapter(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
                continue
            times_s.append(time.perf_counter() - started)
            sizes.append(answer.adapter.current.size_bytes)

    await asyncio.gather(*(register_some() for _ in range(min(concurrency, count))))
    return Registered(names, times_s, sum(sizes))


def geometry_of(shape: ModelShape, max_lora_rank: int = 64, dtype: str = "bfloat16") -> BaseGeometry:
    """A base of this shape as adapters see it."""
    hidden, kv_dim, ffn = shape.hidden_size, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    in_features = (*(hidden,) * 6, ffn)
    out_features = (hidden, kv_dim, kv_dim, hidden, ffn, ffn, hidden)
    return BaseGeometry(
        model_name=shape.name,
        fingerprint=shape.name.encode().hex().ljust(64, "0"),
        dtype=dtype,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        modules=tuple(map(LinearShape, LORA_MODULES, in_features, out_features)),
        max_lora_rank=max_lora_rank,
    )


def _solo(geometry: BaseGeometry, dummy: DummyAdapter, root: Path) -> dict[str, float]:
    """Milliseconds of the parts of a registration, medians, one after the other in this thread."""
    store = ImageStore(root / "solo")
    makes_ms, writes_ms = [], []
    for seed in range(NUM_SOLO):
        begin = time.perf_counter()
        image = build_dummy(DummyAdapter(dummy.rank, dummy.target_modules, seed), geometry)
        made = time.perf_counter()
        store.publish(image)
        written = time.perf_counter()
        store.delete(image.digest)
        makes_ms.append((made - begin) * 1e3)
        writes_ms.append((written - made) * 1e3)
    return {"make_and_hash": statistics.median(makes_ms), "write_and_sync": statistics.median(writes_ms)}


@asynccontextmanager
async def _control_plane(root: Path, geometry: BaseGeometry) -> AsyncIterator[str]:
    """A control plane in a process of its own, which knows its base from a data plane in this one."""
    data_plane, address = f"unix:{root}/dp", f"unix:{root}/cp"
    command = ["-m", "controlplane", "--model", str(MODEL), "--data-plane", data_plane, "--listen", address]
    command += ["--state-dir", str(root / "state"), "--allow-dummy-adapters"]
    async with serve(data_plane, NullConfig(geometry=geometry)):
        with (root / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=log, stderr=log)
        try:
            serving, ended = (asyncio.ensure_future(each) for each in (_wait_until_serving(address), process.wait()))
            await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise SystemExit(f"the control plane ended:\n{(root / 'log').read_text()}")
            await serving
            yield address
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _wait_until_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=START_TIMEOUT_S, wait_for_ready=True
        )
        async for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def _measure(address: str, args: argparse.Namespace) -> dict[str, object]:
    async with grpc.aio.insecure_channel(address) as channel:
        started = time.perf_counter()
        done = await _register(channel, args.ranks, args.modules, args.count, args.seed, args.concurrency, args.names)
        wall_s = time.perf_counter() - started
    if len(done.times_s) < 2:
        raise SystemExit(f"{len(done.times_s)} of {args.count} adapters were new: nothing to measure; take other --names")
    quantiles = statistics.quantiles(done.times_s, n=100, method="inclusive")
    return {
        "count": len(done.times_s),
        "ranks": list(args.ranks),
        "modules": list(args.modules),
        "concurrency": args.concurrency,
        "image_mib": done.size_bytes / len(done.times_s) / MIB,
        "adapters_per_s": len(done.times_s) / wall_s,
        "mib_per_s": done.size_bytes / MIB / wall_s,
        "call_p50_ms": quantiles[49] * 1e3,
        "call_p99_ms": quantiles[98] * 1e3,
    }


async def _measure_own(args: argparse.Namespace) -> dict[str, object]:
    """Starts what is needed in a temporary directory, and takes everything away afterwards."""
    geometry = geometry_of(SHAPES[args.shape], max_lora_rank=max(args.ranks))
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="loraplane-dummies-") as name:
        root = Path(name)
        async with _control_plane(root, geometry) as address:
            measured = await _measure(address, args)
        solo_ms = _solo(geometry, DummyAdapter(args.ranks[0], tuple(args.modules), 0), root)
    return {"shape": args.shape, **measured, "one_thread_ms": solo_ms}


def main() -> None:
    """Registers, prints what it took and, asked to, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="a running service; without it one is started")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="given to the adapters in turn (8)")
    parser.add_argument("--modules", nargs="+", default=list(ATTENTION), help="linear modules that they change (q, k, v, o)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=16, help="calls at a time (16)")
    parser.add_argument("--names", default="adapter-{i}", help="of the adapters, {i} is the number (adapter-{i})")
    parser.add_argument("--shape", choices=SHAPES, default=LLAMA_7B.name, help="of the base, without --server (llama-7b)")
    parser.add_argument(
        "--dir", type=Path, help="where the images lie for the time, without --server (the system's temporary one)"
    )
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS / "registration.json", help="write a result file")
    args = parser.parse_args()
    measured = asyncio.run(_measure(args.server, args) if args.server else _measure_own(args))
    for key, value in measured.items():
        print(f"{key:16s} {value:,.4g}" if isinstance(value, float) else f"{key:16s} {value}")
    if args.out is not None:
        write_result(args.out, measured, ("grpcio", "protobuf", "redis", "torch"))


if __name__ == "__main__":
    main()
