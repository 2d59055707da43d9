"""The same load on transformers and peft, as one would serve adapters with them: static batches of one adapter at a time.

    python -m benchmarks.baselines.peft_serve --setting S1 --adapters 5,100 --max-seconds 60

The result has the form of benchmarks.serve's. A run ends when all requests are done or its time is up; rates are then of what was
completed, which is why a few requests measure them as well as many.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.peft_model import PeftAdapters, PeftGenerator
from benchmarks.baselines.static_batches import BatchLimits, Clock, serve_static
from benchmarks.device_timing import device_name
from benchmarks.model_shapes import write_config
from benchmarks.options import DTYPES, add_device_option, add_result_options, make_parser
from benchmarks.result_file import RESULTS, ResultFile
from benchmarks.screen import say, show
from benchmarks.serving.metrics import measure
from benchmarks.serving.options import add_load_options, workload_of
from benchmarks.serving.outcome import Outcome, PlannedRequest
from benchmarks.serving.plan import Rate, RunPlan, Workload, draw_trace
from benchmarks.serving.trace import TraceRequest
from benchmarks.workload import SETTINGS, Setting

SYSTEM = "peft"
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class PeftOptions:
    """The command line. model_dir: of another shape than the setting's. num_adapters: of each run. rate: None is all at once."""

    setting: Setting
    model_dir: Path | None
    num_adapters: tuple[int, ...]
    rate: float | None
    cv: float
    workload: Workload
    max_seconds: float
    max_batch: int
    num_loaded: int
    device: torch.device
    dtype: torch.dtype
    commit: str | None
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all runs and writes the result after each; 1 if one failed."""
    options = _parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = options.model_dir or write_config(options.setting.shape, Path(directory) / options.setting.shape.name)
        return run_all(options, model_dir)


def run_all(options: PeftOptions, model_dir: Path) -> int:
    """All runs in their order; 1 if one failed."""
    setting = options.setting
    adapters = PeftAdapters(setting.ranks, setting.modules, max(options.num_adapters), options.num_loaded)
    generator = PeftGenerator(model_dir, adapters, options.device, options.dtype, options.workload.seed)
    result = ResultFile(options.out, PACKAGES, device=device_name(options.device.type), commit=options.commit)
    runs: list[dict[str, Any]] = []
    result.measured |= {
        "system": SYSTEM,
        "setting": setting.name,
        "ranks": list(setting.ranks),
        "modules": list(setting.modules),
        "model": model_dir.name,
        "dtype": str(options.dtype).removeprefix("torch."),
        "runs": runs,
    }

    def add(num_adapters: int) -> dict[str, Any]:
        runs.append(run := _run(options, generator, num_adapters))
        done = {"done": f"{run['num_completed']} of {run['num_requests']}"}
        show(f"{num_adapters} adapters", done | {name: run[name] for name in ("requests_per_s", "output_tokens_per_s", "wall_s")})
        return {}

    for num_adapters in options.num_adapters:
        result.add(f"{num_adapters} adapters", partial(add, num_adapters))
    return 1 if result.failed else 0


def _run(options: PeftOptions, generator: PeftGenerator, num_adapters: int) -> dict[str, Any]:
    rate, workload = options.rate, options.workload
    plan = RunPlan(num_adapters, Rate(rate) if rate is not None else None, options.cv)
    requests = _planned(draw_trace(plan, workload, rate))
    limits = BatchLimits(options.max_batch, generator.max_batch_tokens())
    generator.begin()
    copies_before = generator.num_copies
    clock = Clock(generator.now, generator.sleep)
    outcomes, counts = serve_static(requests, generator, limits, options.max_seconds, clock, _show_batch(generator.now))
    wall_s = generator.now()
    # Of requests that were cut off as well: what they got was computed for somebody.
    useful_tokens = sum(outcome.num_tokens for outcome in outcomes)
    about: dict[str, Any] = {"kind": plan.kind, "num_adapters": num_adapters, "alpha": workload.alpha, "seed": workload.seed}
    if rate is not None:
        about |= {"rate": rate, "cv": options.cv, "duration_s": workload.duration_s}
    return {
        **about,
        "lengths": list(workload.lengths),
        **measure(outcomes, wall_s),
        "max_seconds": options.max_seconds,
        "batches": {
            "count": counts.batches,
            "mean_requests": counts.computed_tokens / counts.steps if counts.steps else 0.0,
            "computed_tokens_per_s": counts.computed_tokens / wall_s,
            "useful_tokens_per_s": useful_tokens / wall_s,
            "useful_share": useful_tokens / max(1, counts.computed_tokens),
            "too_large": counts.too_large,
            "max_tokens": limits.max_tokens,
            "adapter_copies": generator.num_copies - copies_before,
        },
    }


def _planned(trace: Sequence[TraceRequest]) -> list[PlannedRequest]:
    return [
        PlannedRequest(i, r.at_s, "" if r.adapter is None else str(r.adapter), r.input_tokens, r.output_tokens)
        for i, r in enumerate(trace)
    ]


def _show_batch(now: Callable[[], float]) -> Callable[[Sequence[Outcome]], None]:
    def show_batch(outcomes: Sequence[Outcome]) -> None:
        done = sum(outcome.is_ok for outcome in outcomes)
        who = outcomes[0].request.adapter or "base"
        say(f"{now():7.1f} s: adapter {who}, {done} of a batch of {len(outcomes)} done")

    return show_batch


def _parse(argv: Sequence[str] | None) -> PeftOptions:
    parser = make_parser("benchmarks.baselines.peft_serve", __doc__)
    parser.add_argument("--setting", required=True, choices=SETTINGS)
    parser.add_argument("--model", type=Path, metavar="DIR", help="the config.json of another shape than the setting's")
    add_load_options(parser.add_argument_group("load"))
    parser.add_argument("--rate", type=float, metavar="PER_S", help="without it all requests come at once")
    parser.add_argument("--cv", type=float, default=1.0, help="burstiness of arrivals; 1 is Poisson (1)")
    parser.add_argument("--max-seconds", type=float, default=60.0, metavar="SECONDS", help="of each run (60)")
    parser.add_argument("--max-batch", type=int, default=256, metavar="N", help="requests in a batch, if they fit (256)")
    parser.add_argument("--loaded", type=int, default=8, metavar="N", help="adapters on the device at once (8)")
    add_device_option(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    add_result_options(parser, "serving_peft_SETTING.json")
    args = parser.parse_args(argv)
    num_adapters = ((0,) if args.base_only else ()) + args.adapters
    if not num_adapters:
        parser.error("nothing to run: give --adapters or --base-only")
    try:
        workload = workload_of(args)
    except ValueError as error:
        parser.error(str(error))
    return PeftOptions(
        setting=SETTINGS[args.setting],
        model_dir=args.model,
        num_adapters=num_adapters,
        rate=args.rate,
        cv=args.cv,
        workload=workload,
        max_seconds=args.max_seconds,
        max_batch=args.max_batch,
        num_loaded=args.loaded,
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        commit=args.commit,
        out=args.out or RESULTS / f"serving_{SYSTEM}_{args.setting}.json",
    )


if __name__ == "__main__":
    # Nothing is fetched: the shape is here, the weights are random.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
