"""How long the LoRA part of one step takes, against the bytes that it must move, a padded torch.bmm and a loop over adapters.

Needs a CUDA device: `python -m benchmarks.kernels` writes results/kernels.json. Everything is timed as the replay of a graph.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

if not __package__:
    # As a script, this file's folder comes first on the path, and "kernels" means this file.
    sys.exit("run it as: python -m benchmarks.kernels")

from benchmarks.result_file import RESULTS, write_result
from kernels.lora import LoraAdapter, LoraLaunches, LoraRows, LoraTarget
from kernels.lora_cuda import CudaLoraOps
from kernels.plan_layout import LoraLimits

Group = tuple[LoraTarget, ...]

NUM_LAYERS = 32
# Of the baselines, which take up to a hundred times as long: their times are scaled to all layers.
BASELINE_LAYERS = 4
DTYPE = torch.bfloat16
NUM_REPLAYS = 30


def group(in_features: int, **out_features: int) -> Group:
    """The targets of one input, side by side in y."""
    targets, start = [], 0
    for name, width in out_features.items():
        targets.append(LoraTarget(name, in_features, width, start))
        start += width
    return tuple(targets)


LLAMA_7B = (group(4096, q=4096, k=4096, v=4096), group(4096, o=4096))
LLAMA_3_8B = (
    group(4096, q=4096, k=1024, v=1024),
    group(4096, o=4096),
    group(4096, gate=14336, up=14336),
    group(14336, down=4096),
)


@dataclass(frozen=True)
class Row:
    """One row of the table. target_ms: of docs/performance.md. Tokens are dealt to adapters in turn, or in runs for prefill."""

    name: str
    groups: tuple[Group, ...]
    num_tokens: int
    ranks: tuple[int, ...]
    target_ms: float | None
    is_prefill: bool = False

    @property
    def adapter_index(self) -> list[int]:
        """Which adapter each token has."""
        per_adapter = self.num_tokens // len(self.ranks)
        return [t // per_adapter if self.is_prefill else t % len(self.ranks) for t in range(self.num_tokens)]

    @property
    def launches(self) -> LoraLaunches:
        """What may be captured for such a step."""
        return LoraLaunches.AS_NEEDED if self.is_prefill else LoraLaunches.DECODE

    @property
    def num_bytes(self) -> int:
        """Each used weight read once, x read, y read and written."""
        targets = [target for g in self.groups for target in g]
        weights = sum(rank * (t.in_features + t.out_features) for rank in self.ranks for t in targets)
        activations = sum(g[0].in_features + 2 * sum(t.out_features for t in g) for g in self.groups)
        return 2 * NUM_LAYERS * (weights + self.num_tokens * activations)


ROWS = (
    Row("1 token, 1 adapter, rank 16", LLAMA_7B, 1, (16,), 0.3),
    Row("32 tokens of 32 adapters, rank 16", LLAMA_7B, 32, (16,) * 32, 0.5),
    Row("64 of 64, rank 16", LLAMA_7B, 64, (16,) * 64, 0.8),
    Row("64 tokens of 8 adapters, rank 8", LLAMA_7B, 64, (8,) * 8, 0.35),
    Row("64 of 64, rank 64", LLAMA_7B, 64, (64,) * 64, 2.7),
    Row("64 of 64, ranks 8, 16, 32, 64", LLAMA_7B, 64, (8, 16, 32, 64) * 16, None),
    Row("256 tokens of 32 adapters, rank 16", LLAMA_7B, 256, (16,) * 32, None),
    Row("Llama-3-8B shape, all seven modules, 64 of 64, rank 16", LLAMA_3_8B, 64, (16,) * 64, 1.9),
    Row("Llama-3-8B shape, all seven modules, 64 of 64, ranks 8, 16, 32, 64", LLAMA_3_8B, 64, (8, 16, 32, 64) * 16, None),
    Row("prefill, 4096 tokens of 8 adapters, rank 16", LLAMA_7B, 4096, (16,) * 8, 4.5, is_prefill=True),
    Row("prefill, 4096 tokens of 8 adapters, rank 64", LLAMA_7B, 4096, (64,) * 8, None, is_prefill=True),
)


@dataclass(frozen=True)
class Times:
    """Of one replay, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float


def replay_times(step: Callable[[], None], scale: float = 1.0) -> Times:
    """Captures the step and times replays of it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for i in range(NUM_REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(scale * start.elapsed_time(end))
    return Times(statistics.median(times), min(times), max(times))


class Weights:
    """All layers of a pool full of adapters, each row beside the next in shuffled order, and activations."""

    def __init__(self, row: Row) -> None:
        targets = [target for g in row.groups for target in g]
        layer_elems = sum(rank * (t.in_features + t.out_features) for rank in row.ranks for t in targets)
        self.pool = torch.empty(NUM_LAYERS, layer_elems, dtype=DTYPE, device="cuda")
        for layer in self.pool:
            layer.normal_(std=0.05)
        self._end = 0
        self.adapters = [LoraAdapter({t.module: self._place(t, rank) for t in targets}) for rank in row.ranks]
        self.x = [torch.randn(row.num_tokens, g[0].in_features, device="cuda").to(DTYPE) for g in row.groups]
        self.y = [torch.randn(row.num_tokens, sum(t.out_features for t in g), device="cuda").to(DTYPE) for g in row.groups]

    def _place(self, target: LoraTarget, rank: int) -> LoraRows:
        starts = []
        for length in (target.in_features, target.out_features):
            rows = self._end + length * torch.randperm(rank)
            starts.append(rows.to("cuda"))
            self._end += length * rank
        return LoraRows(rank, 0.5, starts[0], starts[1])

    def matrices(self, layer: int, target: LoraTarget, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A transposed [adapters, in, max_rank] and B transposed [adapters, max_rank, out], padded with zeros."""
        a = torch.zeros(len(self.adapters), max_rank, target.in_features, dtype=DTYPE, device="cuda")
        b = torch.zeros(len(self.adapters), max_rank, target.out_features, dtype=DTYPE, device="cuda")
        for i, adapter in enumerate(self.adapters):
            rows = adapter.modules[target.module]
            a[i, : rows.rank] = self.pool[layer].unfold(0, target.in_features, 1)[rows.a_rows]
            b[i, : rows.rank] = self.pool[layer].unfold(0, target.out_features, 1)[rows.b_rows]
        return a.transpose(1, 2).contiguous(), b


def time_ours(row: Row, weights: Weights) -> tuple[Times, float, float]:
    """Times of the step, and what the host spends on a plan and on launching the step eagerly, in milliseconds."""
    limits = LoraLimits(max_tokens=max(256, row.num_tokens), max_requests=256, max_rank=max(row.ranks))
    ops = CudaLoraOps(row.groups, DTYPE, torch.device("cuda"), limits)
    index = row.adapter_index
    plan = ops.plan(index, weights.adapters, row.launches)

    def step() -> None:
        ops.begin(plan)
        for layer in weights.pool:
            for x, y, g in zip(weights.x, weights.y, row.groups, strict=True):
                ops.add(y, x, layer, plan, g)

    times = replay_times(step)
    start = time.perf_counter()
    for _ in range(10):
        step()
    launch_ms = (time.perf_counter() - start) * 100
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(20):  # in turns, as the plan of an unchanged batch costs nothing
        ops.plan(index if i % 2 else index[::-1], weights.adapters, row.launches)
    return times, (time.perf_counter() - start) * 50, launch_ms


def time_padded_bmm(row: Row, weights: Weights) -> Times:
    """Tokens padded to the busiest adapter's, ranks to the largest: two torch.bmm per module over stacked weights."""
    index = torch.tensor(row.adapter_index)
    rows = [torch.nonzero(index == i).flatten() for i in range(len(row.ranks))]
    most = max(len(r) for r in rows)
    padded = torch.stack([torch.cat([r, r[:1].expand(most - len(r))]) for r in rows]).flatten().to("cuda")
    layers = [
        [[weights.matrices(layer, target, max(row.ranks)) for target in g] for g in row.groups]
        for layer in range(BASELINE_LAYERS)
    ]

    def step() -> None:
        for layer in layers:
            for x, y, g, matrices in zip(weights.x, weights.y, row.groups, layer, strict=True):
                x_padded = x[padded].view(len(rows), most, -1)
                for target, (a, b) in zip(g, matrices, strict=True):
                    delta = torch.bmm(torch.bmm(x_padded, a) * 0.5, b).view(len(padded), -1)
                    y.narrow(1, target.out_start, target.out_features).index_add_(0, padded, delta)

    return replay_times(step, NUM_LAYERS / BASELINE_LAYERS)


def time_adapter_loop(row: Row, weights: Weights) -> Times:
    """Two torch.mm for each adapter and module, with its own rank."""
    index = torch.tensor(row.adapter_index)
    rows = [torch.nonzero(index == i).flatten().to("cuda") for i in range(len(row.ranks))]
    layers = [[[weights.matrices(layer, t, max(row.ranks)) for t in g] for g in row.groups] for layer in range(BASELINE_LAYERS)]

    def step() -> None:
        for layer in layers:
            for x, y, g, matrices in zip(weights.x, weights.y, row.groups, layer, strict=True):
                for i, rank in enumerate(row.ranks):
                    x_rows = x[rows[i]]
                    for target, (a, b) in zip(g, matrices, strict=True):
                        delta = torch.mm(torch.mm(x_rows, a[i, :, :rank]) * 0.5, b[i, :rank])
                        y.narrow(1, target.out_start, target.out_features).index_add_(0, rows[i], delta)

    return replay_times(step, NUM_LAYERS / BASELINE_LAYERS)


def device_bandwidth() -> float:
    """Bytes read and written per second by a large kernel that does nothing else, in TB/s."""
    source = torch.zeros(1 << 30, dtype=DTYPE, device="cuda").uniform_()
    target = torch.empty_like(source)

    def step() -> None:
        torch.neg(source, out=target)

    return 4 * source.numel() / replay_times(step).median_ms / 1e9


def measure(row: Row, ceiling_tb_s: float, *, with_baselines: bool) -> dict[str, object]:
    """One row of the result."""
    torch.manual_seed(0)
    weights = Weights(row)
    times, plan_ms, launch_ms = time_ours(row, weights)
    floor_ms = row.num_bytes / ceiling_tb_s / 1e9
    result: dict[str, object] = {
        "name": row.name,
        "tokens": row.num_tokens,
        "ranks": sorted(set(row.ranks)),
        "adapters": len(row.ranks),
        "target_ms": row.target_ms,
        **asdict(times),
        "bytes": row.num_bytes,
        "floor_ms": floor_ms,
        "times_floor": times.median_ms / floor_ms,
        "tb_per_s": row.num_bytes / times.median_ms / 1e9,
        "plan_host_ms": plan_ms,
        "eager_launch_host_ms": launch_ms,
    }
    if with_baselines:
        result["padded_bmm_ms"] = time_padded_bmm(row, weights).median_ms
        result["adapter_loop_ms"] = time_adapter_loop(row, weights).median_ms
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every row, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--commit", help="what was measured, where it is a copy without its history")
    parser.add_argument("--no-baselines", action="store_true")
    options = parser.parse_args(arguments)
    ceiling = device_bandwidth()
    rows = []
    for row in ROWS:
        found = measure(row, ceiling, with_baselines=not options.no_baselines)
        rows.append(found)
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in found.items()}, flush=True)
        torch.cuda.empty_cache()
    measured = {
        "cuda": torch.version.cuda,
        "device_tb_per_s": ceiling,
        "layers": NUM_LAYERS,
        "baseline_layers": BASELINE_LAYERS,
        "dtype": str(DTYPE),
        "rows": rows,
    }
    device = torch.cuda.get_device_name()
    write_result(options.out, measured, ("torch", "cupy-cuda13x"), device=device, commit=options.commit)


if __name__ == "__main__":
    main()
