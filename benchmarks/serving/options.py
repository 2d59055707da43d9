"""The command line of `benchmarks.serve` as data, checked; its options for the load are there for others. Starts nothing."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_store.geometry import LORA_MODULES
from benchmarks.model_shapes import ATTENTION_MODULES
from benchmarks.options import add_result_options, comma_list, make_parser
from benchmarks.result_file import RESULTS
from benchmarks.serving.adapters import AdapterPlan
from benchmarks.serving.commands import has_option, with_options
from benchmarks.serving.plan import FixedLoad, Rate, RunPlan, Workload, plan_runs
from benchmarks.workload import LENGTHS, SATURATED_REQUESTS, SEED, SETTINGS, Setting

DEFAULT_VOCAB_SIZE = 32000
# A bound that no run reaches: a request that is refused would not be measured. Of our own service alone.
MAX_WAITING = 1 << 16
MAX_CLIENTS = 4


@dataclass(frozen=True, slots=True)
class OpenAiOptions:
    """A server that speaks OpenAI's API. name_template: of adapters, {i} is the number."""

    url: str
    base_model: str
    name_template: str
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and where the result goes. Exactly one of model_dir (or setting), target and openai says where.

    model_dir: None with a setting, whose shape is served with random weights.
    """

    system: str
    setting: Setting | None
    setting_name: str | None
    model_dir: Path | None
    target: str | None
    openai: OpenAiOptions | None
    data_plane: str
    control_plane: str
    idle_prefetch: bool
    state_dir: Path | None
    adapters: AdapterPlan
    runs: tuple[RunPlan, ...]
    workload: Workload
    num_clients: int
    num_warm_up: int
    slo_s: float | None
    with_text: bool
    timeout_s: float
    token: str
    vocab_size: int
    device_name: str | None
    commit: str | None
    out: Path

    @property
    def num_adapters(self) -> int:
        """The most that a run draws from."""
        return max((run.num_adapters for run in self.runs), default=0)


def parse_options(argv: Sequence[str] | None = None, description: str | None = None) -> Options:
    """Reads the command line; ends the process with a message when it is not right."""
    parser = _parser(description)
    args = parser.parse_args(argv)
    try:
        return _options(args)
    except ValueError as error:
        parser.error(str(error))


def add_load_options(group: argparse._ArgumentGroup) -> None:
    """What `workload_of` reads, and over how many adapters, one run each."""
    group.add_argument("--adapters", type=comma_list(int), default=(), metavar="N,N,...", help="how many, one run for each")
    group.add_argument("--base-only", action="store_true", help="measure the base model too, under each load")
    group.add_argument("--requests", type=int, default=SATURATED_REQUESTS, metavar="N", help="when all come at once (400)")
    group.add_argument("--alpha", type=float, default=1.0, help="popularity of adapters; 1 is uniform (1)")
    group.add_argument("--duration", type=float, default=300.0, metavar="SECONDS", help="of arrivals at a rate (300)")
    group.add_argument(
        "--lengths", type=comma_list(int), default=LENGTHS, metavar="FROM,BELOW", help="of prompts and outputs (8,512)"
    )
    group.add_argument("--seed", type=int, default=SEED, help="(42)")


def workload_of(args: argparse.Namespace) -> Workload:
    """What all runs have in common.

    Raises:
        ValueError: it is not right.
    """
    if len(args.lengths) != 2:
        raise ValueError(f"--lengths has {len(args.lengths)} numbers; it takes two, the least and one more than the most")
    return Workload(args.alpha, args.duration, args.requests, args.seed, args.lengths)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.serve", description)
    server = parser.add_argument_group("what is measured; one of --setting, --model, --target, --openai")
    server.add_argument("--setting", choices=SETTINGS, help="start a service of this shape with random weights")
    server.add_argument("--model", type=Path, metavar="DIR", help="start a service of this model")
    server.add_argument("--target", metavar="ADDRESS", help="a service that runs; with --setting its adapters are registered")
    server.add_argument("--openai", metavar="URL", help="a server that speaks OpenAI's API")
    server.add_argument("--load-format", metavar="NAME", help="of the weights (--setting: dummy, --model: auto)")
    server.add_argument("--data-plane", default="dataplane", metavar="MODULE ...", help="another one, or more options for it")
    server.add_argument("--control-plane", default="controlplane", metavar="MODULE ...", help="likewise")
    server.add_argument("--no-idle-prefetch", action="store_true", help="adapters come to the device when requests need them")
    server.add_argument("--state-dir", type=Path, metavar="DIR", help="registry, images, logs; stays (a temporary one)")
    server.add_argument("--token", default="", help="credential for --target, API key for --openai")
    server.add_argument("--base-model", default="", metavar="NAME", help="--openai: the base model's name there")
    server.add_argument("--adapter-name-template", default="adapter-{i}", metavar="TEXT", help="--openai: (adapter-{i})")
    server.add_argument("--openai-extra", type=json.loads, default={}, metavar="JSON", help="--openai: more fields of a request")
    server.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, metavar="N", help="--openai: of prompts (32000)")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--ranks", type=comma_list(int), metavar="R,R,...", help="register random ones of these in turn (--setting: its own)"
    )
    adapters.add_argument(
        "--modules", type=comma_list(str, LORA_MODULES), metavar="NAME,...", help="with --ranks (q, k, v and o, or the setting's)"
    )
    adapters.add_argument("--adapter-dir", type=Path, metavar="DIR", help="register the PEFT directories in it instead")
    load = parser.add_argument_group("load")
    add_load_options(load)
    load.add_argument("--no-saturated", action="store_true", help="no runs with all requests at once")
    load.add_argument(
        "--rates",
        type=comma_list(Rate.parse),
        default=(),
        metavar="R,R,...",
        help="requests/s; N%% of the lowest saturated rate with adapters",
    )
    load.add_argument("--cvs", type=comma_list(float), default=(1.0,), metavar="CV,...", help="burstiness; 1 is Poisson (1)")
    load.add_argument(
        "--fixed",
        type=comma_list(_parse_fixed),
        default=(),
        metavar="NxINxOUT[:ADAPTERS],...",
        help="N requests at once with IN tokens each and OUT to come, such as 64x128x256:8; of the base model without ADAPTERS",
    )
    load.add_argument("--repeat", type=int, default=1, metavar="N", help="make the runs that have no rate so often (1)")
    load.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE", help="replay a trace; repeatable")
    client = parser.add_argument_group("client")
    client.add_argument("--clients", type=int, metavar="N", help="processes (a quarter of the cores, at most 4)")
    client.add_argument("--warmup", type=int, default=256, metavar="N", help="requests before the first run (256)")
    client.add_argument(
        "--slo", type=float, metavar="SECONDS", help="send this as ttft_slo, and judge by it (judge by 6, send none)"
    )
    client.add_argument("--text", action="store_true", help="have the service make text too, not token ids alone")
    client.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (600)")
    report = parser.add_argument_group("in the report")
    report.add_argument("--system", metavar="NAME", help="what was measured (loraplane, -no-prefetch without idle prefetch)")
    report.add_argument("--setting-name", metavar="NAME", help="--openai, --target: the setting that it serves")
    report.add_argument("--device-name", metavar="NAME", help="where, if the server does not say")
    add_result_options(parser, "serving_SYSTEM_SETTING.json")
    return parser


def _options(args: argparse.Namespace) -> Options:
    setting = SETTINGS[args.setting] if args.setting else None
    num_places = sum(bool(place) for place in (args.model or (setting and not args.target), args.target, args.openai))
    if num_places != 1 or (args.openai and setting):
        raise ValueError("one of --setting, --model, --target and --openai says what is measured (--setting goes with --target)")
    if args.openai and not args.base_model:
        raise ValueError("--openai needs --base-model, the base model's name there")
    control_options = {"--max-waiting": str(MAX_WAITING)} | ({"--no-idle-prefetch": ""} if args.no_idle_prefetch else {})
    control_plane = with_options(args.control_plane, control_options)
    # However it was given: by an option of ours or among the control plane's.
    idle_prefetch = not has_option(control_plane, "--no-idle-prefetch")
    if not idle_prefetch and (args.openai or args.target):
        raise ValueError("--no-idle-prefetch is for a service that is started here")
    runs = _runs(args)
    num_adapters = max((run.num_adapters for run in runs), default=0)
    load_format = args.load_format or ("dummy" if setting and not args.model else "auto")
    system = args.system or ("loraplane" if idle_prefetch else "loraplane-no-prefetch")
    setting_name = setting.name if setting else args.setting_name
    name = "_".join(filter(None, (system, setting_name)))
    return Options(
        system=system,
        setting=setting,
        setting_name=setting_name,
        model_dir=args.model,
        target=args.target,
        openai=_openai(args) if args.openai else None,
        data_plane=with_options(args.data_plane, {"--load-format": load_format}),
        control_plane=control_plane,
        idle_prefetch=idle_prefetch,
        state_dir=args.state_dir,
        adapters=_adapter_plan(args, setting, num_adapters),
        runs=runs,
        workload=workload_of(args),
        num_clients=args.clients or max(1, min(MAX_CLIENTS, (os.cpu_count() or 1) // 4)),
        num_warm_up=args.warmup,
        slo_s=args.slo,
        with_text=args.text,
        timeout_s=args.timeout,
        token=args.token,
        vocab_size=args.vocab_size,
        device_name=args.device_name,
        commit=args.commit,
        out=args.out or RESULTS / f"serving_{name}.json",
    )


def _openai(args: argparse.Namespace) -> OpenAiOptions:
    return OpenAiOptions(args.openai, args.base_model, args.adapter_name_template, args.openai_extra)


def _runs(args: argparse.Namespace) -> tuple[RunPlan, ...]:
    if args.trace:
        others = [f"--{name.replace('_', '-')}" for name in ("fixed", "rates", "base_only") if getattr(args, name)]
        if others:
            raise ValueError(f"--trace replays what it holds and nothing else; leave {', '.join(others)} out")
        return tuple(RunPlan(max(args.adapters, default=0), trace=path) for _ in range(args.repeat) for path in args.trace)
    has_saturated = not args.no_saturated and bool(args.adapters or args.base_only)
    if any(rate.is_share for rate in args.rates) and not has_saturated:
        raise ValueError("a rate in percent is of the saturated one; leave --no-saturated out")
    runs = plan_runs(
        args.adapters, args.rates, args.cvs, args.fixed, base_only=args.base_only, saturated=has_saturated, repeat=args.repeat
    )
    found = tuple(runs)
    if not found:
        raise ValueError("nothing to run: give --adapters, --base-only, --fixed or --trace")
    return found


def _parse_fixed(text: str) -> tuple[FixedLoad, int]:
    load, _, num_adapters = text.partition(":")
    return FixedLoad.parse(load), int(num_adapters or 0)


def _adapter_plan(args: argparse.Namespace, setting: Setting | None, count: int) -> AdapterPlan:
    if args.adapter_dir is not None:
        return AdapterPlan(count, directory=args.adapter_dir)
    if args.openai:
        return AdapterPlan(count)
    ranks = args.ranks or (setting.ranks if setting else ())
    modules = args.modules or (setting.modules if setting else ATTENTION_MODULES)
    return AdapterPlan(count, ranks, modules, args.seed)
