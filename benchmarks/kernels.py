"""How long the LoRA part of one step takes, against the bytes that it must move, a padded torch.bmm and a loop over adapters.

Needs a CUDA device: `python -m benchmarks.kernels` writes results/kernels.json. Everything is timed as the replay of a graph.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

if not __package__:
    # As a script, this file's folder comes first on the path, and "kernels" means this file.
    sys.exit("run it as: python -m benchmarks.kernels")

from benchmarks.device_timing import Times, host_ms, replay_times
from benchmarks.lora.baselines import BASELINE_LAYERS, time_adapter_loop, time_padded_bmm
from benchmarks.lora.steps import DTYPE, NUM_LAYERS, STEPS, LoraStep, Weights
from benchmarks.options import add_result_options, make_parser
from benchmarks.result_file import RESULTS, ResultFile
from benchmarks.screen import show
from kernels.lora_cuda import CudaLoraOps
from kernels.plan_layout import LoraLimits


def time_ours(step: LoraStep, weights: Weights) -> tuple[Times, float, float]:
    """Times of the step, and what the host spends on a plan and on launching the step eagerly, in milliseconds."""
    device = torch.device("cuda")
    limits = LoraLimits(max_tokens=max(256, step.num_tokens), max_requests=256, max_rank=max(step.ranks))
    ops = CudaLoraOps(step.groups, DTYPE, device, limits)
    index = step.adapter_index
    plan = ops.plan(index, weights.adapters, step.launches)

    def run() -> None:
        ops.begin(plan)
        for layer in weights.pool:
            for x, y, g in zip(weights.x, weights.y, step.groups, strict=True):
                ops.add(y, x, layer, plan, g)

    times, launch_ms = replay_times(run), host_ms(run, device)
    # In turns, as the plan of an unchanged batch costs nothing.
    indices = itertools.cycle((index[::-1], index))
    return times, host_ms(lambda: ops.plan(next(indices), weights.adapters, step.launches), device), launch_ms


def device_tb_per_s() -> float:
    """What a large kernel that does nothing else reads and writes."""
    source = torch.zeros(1 << 30, dtype=DTYPE, device="cuda").uniform_()
    target = torch.empty_like(source)

    def run() -> None:
        torch.neg(source, out=target)

    return 4 * source.numel() / replay_times(run).median_ms / 1e9


def measure(step: LoraStep, ceiling_tb_s: float, *, with_baselines: bool) -> dict[str, Any]:
    """One row of the result."""
    torch.manual_seed(0)
    weights = Weights(step)
    times, plan_ms, launch_ms = time_ours(step, weights)
    floor_ms = step.num_bytes / ceiling_tb_s / 1e9
    row: dict[str, Any] = {
        "name": step.name,
        "tokens": step.num_tokens,
        "ranks": sorted(set(step.ranks)),
        "adapters": len(step.ranks),
        "target_ms": step.target_ms,
        **asdict(times),
        "bytes": step.num_bytes,
        "floor_ms": floor_ms,
        "times_floor": times.median_ms / floor_ms,
        "tb_per_s": step.num_bytes / times.median_ms / 1e9,
        "plan_host_ms": plan_ms,
        "eager_launch_host_ms": launch_ms,
    }
    if with_baselines:
        row["padded_bmm_ms"] = time_padded_bmm(step, weights).median_ms
        row["adapter_loop_ms"] = time_adapter_loop(step, weights).median_ms
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every row, prints it and writes the result after each; 1 if one failed."""
    parser = make_parser("benchmarks.kernels", __doc__)
    parser.add_argument("--no-baselines", action="store_true", help="the kernels alone")
    add_result_options(parser, "kernels.json")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / "kernels.json"
    result = ResultFile(out, ("torch", "cupy-cuda13x"), device=torch.cuda.get_device_name(), commit=args.commit)
    ceiling = device_tb_per_s()
    rows: list[dict[str, Any]] = []
    about = {"layers": NUM_LAYERS, "baseline_layers": BASELINE_LAYERS, "dtype": str(DTYPE), "device_tb_per_s": ceiling}
    result.measured |= {"cuda": torch.version.cuda, **about, "rows": rows}

    def add(step: LoraStep) -> dict[str, Any]:
        rows.append(measure(step, ceiling, with_baselines=not args.no_baselines))
        show(step.name, rows[-1])
        return {}

    for step in STEPS:
        result.add(step.name, partial(add, step))
        torch.cuda.empty_cache()
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
