"""The same load on transformers and peft, as one would serve adapters with them: static batches of one adapter at a time.

    python -m benchmarks.baselines.peft_serve --setting S1 --adapters 5,100 --max-seconds 60

The result has the form of benchmarks.serve's. A run ends when all requests are done or its time is up; rates are then of what was
completed, which is why a few requests measure them as well as many.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.peft_model import PeftAdapters, PeftGenerator
from benchmarks.baselines.static_batches import BatchLimits, Clock, serve_static
from benchmarks.model_shapes import write_config
from benchmarks.result_file import RESULTS, cpu_name, write_result
from benchmarks.serving.metrics import measure
from benchmarks.serving.outcome import Outcome, PlannedRequest
from benchmarks.serving.trace import TraceRequest
from benchmarks.workload import LENGTHS, SATURATED_REQUESTS, SEED, SETTINGS, Popularity, Setting, open_loop_trace, saturated_trace

SYSTEM = "peft"
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class PeftOptions:
    """The command line. model_dir: of another shape than the setting's. num_adapters: of each run. rate: None is all at once."""

    setting: Setting
    model_dir: Path | None
    num_adapters: tuple[int, ...]
    num_requests: int
    rate: float | None
    duration_s: float
    cv: float
    alpha: float
    seed: int
    lengths: tuple[int, int]
    max_seconds: float
    max_batch: int
    num_loaded: int
    device: torch.device
    dtype: torch.dtype
    commit: str | None
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all runs and writes the result after each."""
    try:
        options = _parse(argv)
        with tempfile.TemporaryDirectory() as directory:
            model_dir = options.model_dir or write_config(options.setting.shape, Path(directory) / options.setting.shape.name)
            run_all(options, model_dir)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_all(options: PeftOptions, model_dir: Path) -> list[dict[str, Any]]:
    """The records of all runs, in their order."""
    setting = options.setting
    adapters = PeftAdapters(setting.ranks, setting.modules, max(options.num_adapters), options.num_loaded)
    generator = PeftGenerator(model_dir, adapters, options.device, options.dtype, options.seed)
    runs = []
    for num_adapters in options.num_adapters:
        run = _run(options, generator, num_adapters)
        print(
            f"{num_adapters} adapters: {run['requests_per_s']:.3f} req/s {run['output_tokens_per_s']:,.0f} tok/s, "
            f"{run['num_completed']} of {run['num_requests']} done in {run['wall_s']:.1f} s",
            flush=True,
        )
        runs.append(run)
        about = {"system": SYSTEM, "setting": setting.name, "ranks": list(setting.ranks), "modules": list(setting.modules)}
        device = torch.cuda.get_device_name() if options.device.type == "cuda" else cpu_name()
        dtype = str(options.dtype).removeprefix("torch.")
        measured = {**about, "model": model_dir.name, "dtype": dtype, "runs": runs}
        write_result(options.out, measured, PACKAGES, device=device, commit=options.commit)
    return runs


def _run(options: PeftOptions, generator: PeftGenerator, num_adapters: int) -> dict[str, Any]:
    requests = _planned(_trace(options, num_adapters))
    limits = BatchLimits(options.max_batch, generator.max_batch_tokens())
    generator.begin()
    copies_before = generator.num_copies
    clock = Clock(generator.now, generator.sleep)
    outcomes, counts = serve_static(requests, generator, limits, options.max_seconds, clock, _show_batch(generator.now))
    wall_s = generator.now()
    # Of requests that were cut off as well: what they got was computed for somebody.
    useful_tokens = sum(outcome.num_tokens for outcome in outcomes)
    about: dict[str, Any] = {"kind": "saturated", "num_adapters": num_adapters, "alpha": options.alpha, "seed": options.seed}
    if options.rate is not None:
        about |= {"kind": "open_loop", "rate": options.rate, "cv": options.cv, "duration_s": options.duration_s}
    return {
        **about,
        "lengths": list(options.lengths),
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


def _trace(options: PeftOptions, num_adapters: int) -> tuple[TraceRequest, ...]:
    popularity = Popularity(num_adapters, options.alpha)
    if options.rate is None:
        return saturated_trace(popularity, num_requests=options.num_requests, seed=options.seed, lengths=options.lengths)
    return open_loop_trace(
        popularity,
        rate=options.rate,
        duration_s=options.duration_s,
        cv=options.cv,
        seed=options.seed,
        lengths=options.lengths,
    )


def _planned(trace: Sequence[TraceRequest]) -> list[PlannedRequest]:
    return [
        PlannedRequest(i, r.at_s, "" if r.adapter is None else str(r.adapter), r.input_tokens, r.output_tokens)
        for i, r in enumerate(trace)
    ]


def _show_batch(now: Callable[[], float]) -> Callable[[Sequence[Outcome]], None]:
    def show(outcomes: Sequence[Outcome]) -> None:
        done = sum(outcome.is_ok for outcome in outcomes)
        who = outcomes[0].request.adapter or "base"
        print(f"{now():7.1f} s: adapter {who}, {done} of a batch of {len(outcomes)} done", file=sys.stderr, flush=True)

    return show


def _parse(argv: Sequence[str] | None) -> PeftOptions:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines.peft_serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", required=True, choices=SETTINGS)
    parser.add_argument("--model", type=Path, metavar="DIR", help="the config.json of another shape than the setting's")
    parser.add_argument("--adapters", required=True, metavar="N,N,...", help="one run for each; 0 is the base model")
    parser.add_argument("--requests", type=int, default=SATURATED_REQUESTS, metavar="N", help="when all come at once (400)")
    parser.add_argument("--rate", type=float, metavar="PER_S", help="without it all requests come at once")
    parser.add_argument("--duration", type=float, default=300.0, metavar="SECONDS", help="of arrivals at a rate (300)")
    parser.add_argument("--cv", type=float, default=1.0, help="burstiness of arrivals; 1 is Poisson (1)")
    parser.add_argument("--alpha", type=float, default=1.0, help="popularity of adapters; 1 is uniform (1)")
    parser.add_argument("--seed", type=int, default=SEED, help="(42)")
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), metavar="FROM,BELOW", help="of prompts and outputs (8,512)"
    )
    parser.add_argument("--max-seconds", type=float, default=60.0, metavar="SECONDS", help="of each run (60)")
    parser.add_argument("--max-batch", type=int, default=256, metavar="N", help="requests in a batch, if they fit (256)")
    parser.add_argument("--loaded", type=int, default=8, metavar="N", help="adapters on the device at once (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(cuda if there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--commit", help="of what was measured, if that is a copy without its history")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(benchmarks/results/serving_peft_SETTING.json)")
    args = parser.parse_args(argv)
    low, below = (int(part) for part in args.lengths.split(","))
    return PeftOptions(
        setting=SETTINGS[args.setting],
        model_dir=args.model,
        num_adapters=tuple(int(part) for part in args.adapters.split(",")),
        num_requests=args.requests,
        rate=args.rate,
        duration_s=args.duration,
        cv=args.cv,
        alpha=args.alpha,
        seed=args.seed,
        lengths=(low, below),
        max_seconds=args.max_seconds,
        max_batch=args.max_batch,
        num_loaded=args.loaded,
        device=torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        dtype=getattr(torch, args.dtype),
        commit=args.commit,
        out=args.out or RESULTS / f"serving_{SYSTEM}_{args.setting}.json",
    )


if __name__ == "__main__":
    # Nothing is fetched: the shape is here, the weights are random.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
