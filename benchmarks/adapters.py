"""How long an adapter takes from host memory into the pool and from the store into host memory, and what it costs a decode step.

Needs a CUDA device: `python -m benchmarks.adapters` writes results/adapters.json. The pool is as large as the service's; what
hit rates, and how long requests wait for their adapters, is for the benchmark of the whole service to say.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

if not __package__:
    sys.exit("run it as: python -m benchmarks.adapters")

from adapter_store.geometry import LORA_MODULES
from adapter_store.host_arena import HostArena
from benchmarks.loading.bench import LoadBench, geometry_of, plain_gb_per_s
from benchmarks.loading.decode import measure_slowdown, stand_in_step
from benchmarks.loading.reads import measure_reads
from benchmarks.model_shapes import LLAMA_3_8B, LLAMA_7B, ModelShape
from benchmarks.result_file import RESULTS, write_result

RANKS = (8, 16, 32, 64, 128)
SETTINGS: tuple[tuple[ModelShape, tuple[str, ...]], ...] = (
    (LLAMA_7B, ("q_proj", "k_proj", "v_proj", "o_proj")),
    (LLAMA_3_8B, LORA_MODULES),
)
ARENA_BYTES = 4 << 30
PLAIN_BYTES = 1 << 30
# Streamed in while steps run, and read from the store.
STREAM_RANK = 16
STEP_TOKENS = 64
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


def measure_decode(bench: LoadBench, modules: Sequence[str]) -> dict[str, object]:
    """A step of a stand-in for the shape's decoder, while adapters stream in."""
    step = stand_in_step(LLAMA_7B.num_layers, LLAMA_7B.hidden_size, LLAMA_7B.intermediate_size, STEP_TOKENS)
    images = bench.images(STREAM_RANK, modules)
    places = [bench.scattered(images[0].num_pages) for _ in range(64)]
    slowdown = measure_slowdown(step, bench.copier, images, places)
    return {"rank": STREAM_RANK, "tokens": STEP_TOKENS, **asdict(slowdown), "ratio": slowdown.ratio}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything, prints it and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "adapters.json")
    parser.add_argument("--commit", help="what was measured, where it is a copy without its history")
    options = parser.parse_args(arguments)
    torch.zeros(1, device="cuda")
    start = time.perf_counter()
    arena = HostArena(ARENA_BYTES, pin_memory=True)
    pin_s = time.perf_counter() - start
    measured: dict[str, object] = {
        "cuda": torch.version.cuda,
        "pinned_gb_per_s": plain_gb_per_s(torch.zeros(PLAIN_BYTES, dtype=torch.uint8).pin_memory()),
        "arena": {"bytes": ARENA_BYTES, "pin_s": pin_s},
        "rows": [],
    }
    print(measured, flush=True)
    rows: list[dict[str, object]] = []
    for shape, modules in SETTINGS:
        bench = LoadBench(geometry_of(shape, max(RANKS)), arena)
        for rank in RANKS:
            rows.append(measure_loads(bench, modules, rank))
            print(rows[-1], flush=True)
        if shape is LLAMA_7B:
            measured["pool_bytes"] = bench.pool.numel() * bench.pool.element_size()
            measured["decode"] = measure_decode(bench, modules)
            print(measured["decode"], flush=True)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    measured["rows"] = rows
    with tempfile.TemporaryDirectory() as directory:
        shape, modules = SETTINGS[0]
        measured["store"] = measure_reads(Path(directory), geometry_of(shape, max(RANKS)), STREAM_RANK, modules, NUM_READ_THREADS)
    print(measured["store"], flush=True)
    write_result(options.out, measured, ("torch",), device=torch.cuda.get_device_name(), commit=options.commit)


if __name__ == "__main__":
    main()
