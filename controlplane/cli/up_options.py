"""The options of `loraplane up`: its own, and those that it hands on to the two planes unchanged."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from controlplane.cli.arguments import positive_seconds

Options = tuple[tuple[str, str | None, str], ...]

# Flag, metavar and meaning of what each process takes; `up` passes the value on as it was given. Without a metavar the flag is
# a switch.
DATA_PLANE_OPTIONS: Options = (
    ("--device", "NAME", "cpu, cuda or auto (auto)"),
    ("--dtype", "NAME", "float32, bfloat16, float16 or auto (auto)"),
    ("--num-pages", "N", "pages of the pool (from free memory)"),
    ("--pool-bytes", "N", "or bytes of the pool"),
    ("--gpu-memory-utilization", "SHARE", "or the share of GPU memory to use"),
    ("--max-num-seqs", "N", "requests in one batch"),
    ("--token-budget", "N", "tokens computed in one step"),
    ("--max-model-len", "N", "prompt plus output of one request"),
    ("--max-lora-rank", "N", "the largest rank of an adapter"),
    ("--host-cache-bytes", "N", "adapters kept in host memory"),
    ("--load-format", "NAME", "auto, or dummy for random weights"),
    ("--no-cuda-graphs", None, "launch every kernel of every step"),
    ("--no-overlap", None, "prepare a step only when the one before has been computed"),
)
CONTROL_PLANE_OPTIONS: Options = (
    ("--redis-url", "URL", "a Redis for the registry (a private one in the state directory)"),
    ("--key-prefix", "PREFIX", "of the registry's keys"),
    ("--max-waiting", "N", "requests that may wait"),
    ("--credentials", "FILE", "JSON file of tokens; without it everybody is admin"),
    ("--no-idle-prefetch", None, "load an adapter only when a request needs it"),
    ("--allow-dummy-adapters", None, "adapters of random weights may be registered, for benchmarks"),
)


@dataclass(frozen=True, slots=True)
class UpConfig:
    """What `up` starts."""

    model: Path
    listen: tuple[str, ...]
    state_dir: Path
    num_data_planes: int
    adapter_roots: tuple[Path, ...]
    data_plane_arguments: tuple[str, ...]
    control_plane_arguments: tuple[str, ...]
    start_timeout_s: float
    stop_timeout_s: float

    @property
    def store_dir(self) -> Path:
        """Adapter images: written by the control plane, read by the data planes."""
        return self.state_dir / "images"

    @property
    def log_dir(self) -> Path:
        """One log file per process."""
        return self.state_dir / "logs"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `up`."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model, in Hugging Face layout")
    parser.add_argument(
        "--listen", action="append", metavar="ADDRESS", help="HOST:PORT or unix:PATH (127.0.0.1:50051); repeatable"
    )
    parser.add_argument("--state-dir", type=Path, default=Path(".state"), metavar="DIR", help="registry, adapters, logs (.state)")
    parser.add_argument("--data-planes", type=int, default=1, metavar="N", help="data plane processes (1)")
    parser.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="register may name adapters under it; repeatable",
    )
    parser.add_argument("--start-timeout", type=positive_seconds, default=1800.0, metavar="SECONDS", help="for loading (1800)")
    parser.add_argument("--stop-timeout", type=positive_seconds, default=40.0, metavar="SECONDS", help="for finishing (40)")
    for title, options in (("data plane", DATA_PLANE_OPTIONS), ("control plane", CONTROL_PLANE_OPTIONS)):
        group = parser.add_argument_group(f"{title} (see python -m {title.replace(' ', '').lower()} --help)")
        for flag, metavar, meaning in options:
            if metavar is None:
                group.add_argument(flag, action="store_true", help=meaning)
            else:
                group.add_argument(flag, metavar=metavar, help=meaning)


def config_from(args: argparse.Namespace, default_listen: str) -> UpConfig:
    """The configuration that the options describe."""
    return UpConfig(
        model=args.model,
        listen=tuple(args.listen or [default_listen]),
        state_dir=args.state_dir.resolve(),
        num_data_planes=args.data_planes,
        adapter_roots=tuple(root.resolve() for root in args.adapter_root),
        data_plane_arguments=_given(args, DATA_PLANE_OPTIONS),
        control_plane_arguments=_given(args, CONTROL_PLANE_OPTIONS),
        start_timeout_s=args.start_timeout,
        stop_timeout_s=args.stop_timeout,
    )


def _given(args: argparse.Namespace, options: Options) -> tuple[str, ...]:
    given: list[str] = []
    for flag, metavar, _ in options:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if metavar is None:
            given += [flag] if value else []
        elif value is not None:
            # With the sign, a value that begins with a dash is still a value.
            given.append(f"{flag}={value}")
    return tuple(given)
