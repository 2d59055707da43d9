"""How long a step of the engine takes and where the time goes: by batch, by adapters and by rank, the base model beside it.

Needs a CUDA device: `python -m benchmarks.engine` writes results/engine.json. Random weights; packing, launching, sampling and
waiting as in the service, one step ahead, without its messages. `--shape tiny --device cpu` tries the benchmark itself.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import RESULTS, cpu_name, write_result
from benchmarks.steps.bench import BenchOptions, StepBench
from benchmarks.steps.claims import claims
from benchmarks.steps.disabled_lora import WITHOUT_LORA
from benchmarks.steps.parts import FLOOR_TB_PER_S
from benchmarks.steps.scenarios import Row, Scenarios
from benchmarks.steps.settings import ATTENTION_MODULES, SETTINGS, WIDE_MODULES, StepSettings
from dataplane.parts import Parts

SECTIONS = ("decode", "mixed_batch", "prompts", "streaming", "base_only", "disabled", "wide")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints what was measured and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SETTINGS, default="llama-7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (everything)")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--commit", help="what was measured, where it is a copy without its history")
    args = parser.parse_args(arguments)
    settings = SETTINGS[args.shape]
    measured: dict[str, Any] = {
        "shape": settings.shape.name,
        "wide_shape": settings.wide_shape.name,
        "dtype": args.dtype,
        "context": settings.context,
        "num_decodes": settings.num_decodes,
        "most_adapters": settings.max_large,
        "floor_tb_per_s": FLOOR_TB_PER_S,
    }
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    packages = ("torch", "cupy-cuda13x") if args.device == "cuda" else ("torch",)
    for measure in (_measure, _measure_without_lora, _measure_wide):
        measured |= measure(settings, args)
        measured["claims"] = claims(measured)
        # After each part: one that fails must not take along what the others measured.
        write_result(args.out, measured, packages, device=device, commit=args.commit)
        # What the next one loads takes the room of this one.
        gc.collect()
        torch.cuda.empty_cache()
    for claim in measured["claims"]:
        print(
            f"{'holds' if claim['holds'] else 'FAILS'}  {claim['value']:.3f} <= {claim['limit']:g}  {claim['what']}", flush=True
        )
    return 0


def _measure(settings: StepSettings, args: argparse.Namespace) -> dict[str, Any]:
    """The shape with adapters on q, k, v and o."""
    if not set(args.sections) - {"disabled", "wide"}:
        return {}
    scenarios = _load(settings, args, settings.ranks)
    measured: dict[str, Any] = {}
    if "decode" in args.sections:
        measured["decode"] = []
        for batch in settings.batches:
            measured["decode"] += _timed(f"batch {batch}", partial(scenarios.decode_rows, batch))
    if "mixed_batch" in args.sections:
        measured["mixed_batch"] = _timed("mixed batch", scenarios.mixed_batch)
    if "prompts" in args.sections:
        measured["prompts"] = _timed("prompts", scenarios.prompt_rows)
    # On the CPU nothing is copied beside a step.
    if "streaming" in args.sections and args.device == "cuda":
        measured["streaming"] = _timed("streaming", scenarios.streaming_rows)
    if "base_only" in args.sections:
        measured |= _timed("base only", scenarios.base_only)
    return measured


def _measure_without_lora(settings: StepSettings, args: argparse.Namespace) -> dict[str, Any]:
    """A data plane that has no LoRA at all."""
    if "disabled" not in args.sections:
        return {}
    scenarios = _load(settings, args, without_lora=True)
    return {"without_lora": _timed("without LoRA", scenarios.base_only)["base_only"]}


def _measure_wide(settings: StepSettings, args: argparse.Namespace) -> dict[str, Any]:
    """The other shape, with adapters of mixed ranks on every linear module."""
    if "wide" not in args.sections:
        return {}
    return {"wide": _timed("wide", _load(settings, args, settings.wide_ranks, wide=True).wide_rows)}


def _load(
    settings: StepSettings, args: argparse.Namespace, ranks: tuple[int, ...] = (), wide: bool = False, without_lora: bool = False
) -> Scenarios:
    started_at = time.monotonic()
    options = BenchOptions(
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.token_budget,
        num_tokens=settings.num_tokens(settings.max_num_seqs if ranks and not wide else settings.max_large),
        modules=WIDE_MODULES if wide else ATTENTION_MODULES,
        ranks=ranks,
        num_places=settings.num_places if ranks and not wide else 0,
    )
    bench = StepBench(settings.wide_shape if wide else settings.shape, options, WITHOUT_LORA if without_lora else Parts())
    print(f"loaded in {time.monotonic() - started_at:.1f} s, {bench.loaded.limits.num_pages} pages", flush=True)
    return Scenarios(bench, settings)


def _timed(name: str, measure: Callable[[], Any]) -> Any:
    """What it measures, printed a line for each row, with how long that took."""
    started_at = time.monotonic()
    found = measure()
    print(f"{name}: {time.monotonic() - started_at:.1f} s", flush=True)
    for row in found if isinstance(found, list) else [found]:
        print(f"  {_line(row)}", flush=True)
    return found


# Of the columns of a row, what a line on the screen has room for, by short names.
_SHOWN = {
    "step_ms": "step",
    "times_base": "x base",
    "times_floor": "x floor",
    "forward_ms": "fwd",
    "gemm_ms": "gemm",
    "attention_ms": "attn",
    "lora_ms": "lora",
    "other_device_ms": "other",
    "host_ms": "host",
    "launch_ms": "launch",
    "launch_arrays_ms": "arrays",
    "launch_upload_ms": "upload",
    "launch_forward_ms": "forward",
    "launch_sampling_ms": "sampling",
    "attention_plan_ms": "attn plan",
    "lora_plan_ms": "lora plan",
    "wait_share": "waits",
    "mixed_ms": "mixed",
    "expected_ms": "expected",
    "quiet_ms": "quiet",
    "loading_ms": "loading",
    "gb_per_s": "GB/s",
}


def _line(row: Row) -> str:
    """Numbers of a row, or of the only row within it."""
    for inner in row.values():
        if isinstance(inner, dict):
            return _line(inner)
    names = [str(row[name]) for name in ("batch", "decodes", "prompt_tokens", "adapters") if name in row]
    numbers = [f"{short} {value:.2f}" for name, short in _SHOWN.items() if isinstance(value := row.get(name), float)]
    return f"{' / '.join(names)}: {' '.join(numbers)}"


if __name__ == "__main__":
    sys.exit(main())
