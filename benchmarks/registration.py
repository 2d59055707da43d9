"""How many adapters a second can be registered: dummies of random weights in bulk through the admin RPC.

`python -m benchmarks.registration` starts a control plane beside a data plane that computes nothing, and writes
results/registration.json; it needs no GPU. With --target it fills a service that runs (started with --allow-dummy-adapters).
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import LORA_MODULES, BaseGeometry
from adapter_store.image_store import ImageStore
from benchmarks.model_shapes import ATTENTION_MODULES, DEMO_MODEL, LLAMA_7B, SHAPES, geometry_of
from benchmarks.options import add_result_options, comma_list, make_parser
from benchmarks.percentiles import percentiles
from benchmarks.process import ProcessFailedError
from benchmarks.registering import CONCURRENCY, dummy_requests, register_all
from benchmarks.result_file import RESULTS, write_result
from benchmarks.screen import say, show
from benchmarks.serving.service import ServiceOptions, running_service

# Images made one after the other in this process, to tell where the time goes.
NUM_SOLO = 12
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Registers, prints what it took and writes the result, of a service of its own or where --out says."""
    parser = make_parser("benchmarks.registration", __doc__)
    parser.add_argument("--target", metavar="ADDRESS", help="a service that runs; without it one is started")
    parser.add_argument("--token", default="", help="credential for --target")
    parser.add_argument("--adapters", type=int, default=200, metavar="N", help="how many (200)")
    parser.add_argument("--ranks", type=comma_list(int), default=(8,), metavar="R,R,...", help="given to them in turn (8)")
    parser.add_argument(
        "--modules", type=comma_list(str, LORA_MODULES), default=ATTENTION_MODULES, metavar="NAME,...", help="(q, k, v and o)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, metavar="N", help=f"calls at a time ({CONCURRENCY})")
    parser.add_argument(
        "--adapter-name-template", default="adapter-{i}", metavar="TEXT", help="{i} is the adapter's number (adapter-{i})"
    )
    parser.add_argument("--shape", choices=SHAPES, default=LLAMA_7B.name, help="of the base, without --target (llama-7b)")
    parser.add_argument("--dir", type=Path, help="where images lie meanwhile, without --target (the system's temporary one)")
    add_result_options(parser, "registration.json")
    args = parser.parse_args(argv)
    try:
        measured = asyncio.run(_register(args.target, args)) if args.target else _measure_own(args)
    except grpc.aio.AioRpcError as error:
        say(f"{error.code().name}: {error.details()}")
        return 1
    except (ProcessFailedError, ValueError, OSError) as error:
        say(str(error))
        return 1
    show("registered", measured)
    if args.out is not None or not args.target:
        out = args.out or RESULTS / "registration.json"
        write_result(out, measured, ("grpcio", "protobuf", "redis", "torch"), commit=args.commit)
    return 0


def _measure_own(args: argparse.Namespace) -> dict[str, object]:
    """Starts what is needed in a temporary directory, and takes everything away afterwards."""
    max_rank = max(args.ranks)
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="loraplane-registration-") as name:
        service = ServiceOptions(
            DEMO_MODEL,  # for its tokenizer; the shape of the base is what the data plane says
            Path(name) / "state",
            data_plane=f"benchmarks.null_data_plane --shape {args.shape} --max-lora-rank {max_rank}",
            control_plane="controlplane --allow-dummy-adapters",
        )
        with running_service(service) as running:
            measured = asyncio.run(_register(running.address, args))
        geometry = geometry_of(SHAPES[args.shape], max_rank)
        solo_ms = _solo_ms(geometry, DummyAdapter(args.ranks[0], args.modules, 0), Path(name) / "solo")
    return {"shape": args.shape, **measured, "one_thread_ms": solo_ms}


async def _register(address: str, args: argparse.Namespace) -> dict[str, object]:
    requests = dummy_requests(args.ranks, args.modules, args.adapters, args.seed, args.adapter_name_template)
    metadata = (("authorization", f"Bearer {args.token}"),) if args.token else ()
    async with grpc.aio.insecure_channel(address) as channel:
        started_at = time.perf_counter()
        done = await register_all(channel, requests, args.concurrency, metadata)
        wall_s = time.perf_counter() - started_at
    count = len(done.times_s)
    if not count:
        raise ValueError(f"none of {args.adapters} adapters was new: nothing to measure; take other names")
    p50_s, p99_s = percentiles(done.times_s, 50, 99)
    return {
        "count": count,
        "ranks": list(args.ranks),
        "modules": list(args.modules),
        "concurrency": args.concurrency,
        "image_mib": done.size_bytes / count / MIB,
        "adapters_per_s": count / wall_s,
        "mib_per_s": done.size_bytes / MIB / wall_s,
        "call_p50_ms": p50_s * 1e3,
        "call_p99_ms": p99_s * 1e3,
    }


def _solo_ms(geometry: BaseGeometry, dummy: DummyAdapter, directory: Path) -> dict[str, float]:
    """Of the parts of a registration, medians, one after the other in this thread."""
    store = ImageStore(directory)
    makes_ms, writes_ms = [], []
    for seed in range(NUM_SOLO):
        started_at = time.perf_counter()
        image = build_dummy(DummyAdapter(dummy.rank, dummy.target_modules, seed), geometry)
        made_at = time.perf_counter()
        store.publish(image)
        written_at = time.perf_counter()
        store.delete(image.digest)
        makes_ms.append((made_at - started_at) * 1e3)
        writes_ms.append((written_at - made_at) * 1e3)
    return {"make_and_hash": statistics.median(makes_ms), "write_and_sync": statistics.median(writes_ms)}


if __name__ == "__main__":
    sys.exit(main())
