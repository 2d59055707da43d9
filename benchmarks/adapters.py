"""How long an adapter takes from host memory into the pool, and from the store into host memory.

Needs a CUDA device: `python -m benchmarks.adapters` writes results/adapters.json. The pool is as large as the service's. What a
step pays for loads beside it is measured by benchmarks.engine, hit rates and waiting for adapters by benchmarks.serve.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

if not __package__:
    sys.exit("run it as: python -m benchmarks.adapters")

from adapter_store.geometry import LORA_MODULES
from adapter_store.host_arena import HostArena
from benchmarks.loading.bench import LoadBench, plain_gb_per_s
from benchmarks.loading.reads import measure_reads
from benchmarks.model_shapes import ATTENTION_MODULES, LLAMA_3_8B, LLAMA_7B, ModelShape, geometry_of
from benchmarks.options import add_result_options, make_parser
from benchmarks.result_file import RESULTS, ResultFile
from benchmarks.screen import show

RANKS = (8, 16, 32, 64, 128)
SETTINGS: tuple[tuple[ModelShape, tuple[str, ...]], ...] = (
    (LLAMA_7B, ATTENTION_MODULES),
    (LLAMA_3_8B, LORA_MODULES),
)
ARENA_BYTES = 4 << 30
PLAIN_BYTES = 1 << 30
# Of what is read from the store.
READ_RANK = 16
NUM_READ_THREADS = 4


def measure_loads(bench: LoadBench, modules: Sequence[str], rank: int) -> dict[str, object]:
    """One row: one adapter into one run of pages, and into single pages."""
    images = bench.images(rank, modules)
    size_bytes, num_pages = images[0].size_bytes, images[0].num_pages
    row: dict[str, object] = {
        "shape": bench.geometry.model_name,
        "modules": len(modules),
        "rank": rank,
        "bytes": size_bytes,
        "pages": num_pages,
        "plain_ms": bench.time_plain(images),
    }
    for name, pages_of in (("contiguous", bench.contiguous), ("single_pages", bench.scattered)):
        times = bench.time_loads(images, pages_of)
        row[name] = {
            **asdict(times),
            "gb_per_s": size_bytes / times.median_ms / 1e6,
            "back_to_back_gb_per_s": bench.loads_per_s(images, pages_of) * size_bytes / 1e9,
        }
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measures everything, prints it and writes the result after each part; 1 if one failed."""
    parser = make_parser("benchmarks.adapters", __doc__)
    add_result_options(parser, "adapters.json")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / "adapters.json"
    result = ResultFile(out, ("torch",), device=torch.cuda.get_device_name(), commit=args.commit)
    torch.zeros(1, device="cuda")
    started_at = time.perf_counter()
    arena = HostArena(ARENA_BYTES, pin_memory=True)
    pin_s = time.perf_counter() - started_at
    rows: list[dict[str, object]] = []
    result.measured |= {
        "cuda": torch.version.cuda,
        "pinned_gb_per_s": plain_gb_per_s(torch.zeros(PLAIN_BYTES, dtype=torch.uint8).pin_memory()),
        "arena": {"bytes": ARENA_BYTES, "pin_s": pin_s},
        "rows": rows,
    }
    for shape, modules in SETTINGS:
        result.add(shape.name, partial(_measure_pool, shape, modules, arena, rows))
        gc.collect()
        torch.cuda.empty_cache()
    result.add("store", _measure_store)
    return 1 if result.failed else 0


def _measure_pool(
    shape: ModelShape, modules: tuple[str, ...], arena: HostArena, rows: list[dict[str, object]]
) -> dict[str, object]:
    """Loads into a pool of that shape. Pools of all shapes are about as large, so one size is told."""
    bench = LoadBench(geometry_of(shape, max(RANKS)), arena)
    for rank in RANKS:
        rows.append(measure_loads(bench, modules, rank))
        show(f"{shape.name}, rank {rank}", rows[-1])
    return {"pool_bytes": bench.pool.numel() * bench.pool.element_size()}


def _measure_store() -> dict[str, object]:
    """Reads of images that the store has."""
    shape, modules = SETTINGS[0]
    with tempfile.TemporaryDirectory() as directory:
        store = measure_reads(Path(directory), geometry_of(shape, max(RANKS)), READ_RANK, modules, NUM_READ_THREADS)
    show("reads", store)
    return {"store": store}


if __name__ == "__main__":
    sys.exit(main())
