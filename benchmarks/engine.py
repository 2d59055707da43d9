"""How long a step of the engine takes and where the time goes: by batch, by adapters and by rank, the base model beside it.

Needs a CUDA device: `python -m benchmarks.engine` writes results/engine.json, again after each section. Random weights; packing,
launching, sampling and waiting as in the service, one step ahead, without its messages. `--shape tiny --device cpu` tries the
benchmark itself.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from adapter_store.geometry import LORA_MODULES
from benchmarks.device_timing import device_name
from benchmarks.model_shapes import ATTENTION_MODULES
from benchmarks.options import DTYPES, add_device_option, add_result_options, comma_list, make_parser
from benchmarks.result_file import RESULTS, ResultFile
from benchmarks.screen import say, show
from benchmarks.steps.bench import BenchOptions, StepBench
from benchmarks.steps.claims import claims
from benchmarks.steps.disabled_lora import WITHOUT_LORA
from benchmarks.steps.parts import ASSUMED_TB_PER_S
from benchmarks.steps.scenarios import Row, Scenarios
from benchmarks.steps.settings import SETTINGS, StepSettings
from dataplane.parts import Parts

Json = dict[str, Any]

# By the model that they run on, which is loaded once: with adapters on q, k, v and o; without any LoRA; the other shape, with
# adapters on every linear module.
SECTIONS = {
    "attention": ("decode", "mixed_batch", "prompts", "streaming", "base_only"),
    "no LoRA": ("without_lora",),
    "wide": ("wide",),
}
ALL_SECTIONS = tuple(name for names in SECTIONS.values() for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures section after section; 1 if one failed."""
    parser = make_parser("benchmarks.engine", __doc__)
    parser.add_argument("--shape", choices=SETTINGS, default="llama-7b")
    add_device_option(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--sections", type=comma_list(str, ALL_SECTIONS), default=ALL_SECTIONS, metavar="NAME,...", help=", ".join(ALL_SECTIONS)
    )
    add_result_options(parser, "engine.json")
    args = parser.parse_args(argv)
    settings = SETTINGS[args.shape]
    packages = ("torch", "cupy-cuda13x", "flashinfer-python")
    result = ResultFile(args.out or RESULTS / "engine.json", packages, device=device_name(args.device), commit=args.commit)
    result.measured |= {
        "shape": settings.shape.name,
        "wide_shape": settings.wide_shape.name,
        "dtype": args.dtype,
        "context": settings.context,
        "num_decodes": settings.num_decodes,
        "most_adapters": settings.max_large,
        "floor_tb_per_s": ASSUMED_TB_PER_S,
    }
    for model, names in SECTIONS.items():
        wanted = [name for name in names if name in args.sections]
        if wanted:
            _measure_on(model, wanted, settings, args, result)
            # What the next one loads takes the room of this one.
            gc.collect()
            torch.cuda.empty_cache()
    for claim in claims(result.measured):
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict}  {claim['value']:.3f} <= {claim['limit']:g}  {claim['what']}", flush=True)
    return 1 if result.failed else 0


def _measure_on(model: str, names: Sequence[str], settings: StepSettings, args: argparse.Namespace, result: ResultFile) -> None:
    """Loads one model and measures sections on it."""
    loaded: list[Scenarios] = []

    def load() -> Json:
        started_at = time.monotonic()
        bench = _load(model, settings, args)
        say(f"{model}: loaded in {time.monotonic() - started_at:.1f} s, {bench.loaded.limits.num_pages} pages")
        loaded.append(Scenarios(bench, settings))
        return {}

    if not result.add(", ".join(names), load):
        return
    (scenarios,) = loaded
    for name in names:
        for title, measure in _parts(name, scenarios, settings, result.measured):
            started_at = time.monotonic()
            if not result.add(title, measure):
                scenarios.clear()
            say(f"{title}: {time.monotonic() - started_at:.1f} s")


def _load(model: str, settings: StepSettings, args: argparse.Namespace) -> StepBench:
    is_wide = model == "wide"
    ranks = {"attention": settings.ranks, "no LoRA": (), "wide": settings.wide_ranks}[model]
    options = BenchOptions(
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.token_budget,
        num_tokens=settings.num_tokens(settings.max_num_seqs if model == "attention" else settings.max_large),
        modules=LORA_MODULES if is_wide else ATTENTION_MODULES,
        ranks=ranks,
        num_places=settings.num_places if model == "attention" else 0,
    )
    return StepBench(settings.wide_shape if is_wide else settings.shape, options, Parts() if ranks else WITHOUT_LORA)


def _parts(name: str, scenarios: Scenarios, settings: StepSettings, measured: Json) -> Iterator[tuple[str, Callable[[], Json]]]:
    """What is measured and written by itself: a section, or one of its batches."""
    match name:
        case "decode":
            for batch in settings.batches:
                yield f"decode, batch {batch}", partial(_decode, scenarios, batch, measured)
        case "mixed_batch":
            yield name, lambda: {name: _shown(name, scenarios.mixed_batch())}
        case "prompts":
            yield name, lambda: {name: [_shown(name, row) for row in scenarios.prompt_rows()]}
        case "streaming":
            # On the CPU nothing is copied beside a step.
            if scenarios.is_cuda:
                yield name, lambda: {name: [_shown(name, row) for row in scenarios.streaming_rows()]}
        case "base_only":
            yield name, lambda: {key: _shown(key, row) for key, row in scenarios.base_only().items()}
        case "without_lora":
            yield name, lambda: {name: _shown(name, scenarios.base_only()["base_only"])}
        case "wide":
            yield name, lambda: {name: [_shown(name, row) for row in scenarios.wide_rows()]}


def _decode(scenarios: Scenarios, batch: int, measured: Json) -> Json:
    """Rows of one batch, behind those of the batches before."""
    return {"decode": measured.get("decode", []) + [_shown("decode", row) for row in scenarios.decode_rows(batch)]}


# Of the columns of a row, what a reader of the screen wants to see, by short names.
_COLUMNS = {
    "step_ms": "step",
    "times_base": "x base",
    "times_floor": "x estimate",
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


def _shown(section: str, row: Row) -> Row:
    """The row, when it was shown."""
    about = [str(row[name]) for name in ("batch", "decodes", "prompt_tokens", "adapters") if name in row]
    show(
        " / ".join([section, *about]), {short: row[name] for name, short in _COLUMNS.items() if isinstance(row.get(name), float)}
    )
    return row


if __name__ == "__main__":
    sys.exit(main())
