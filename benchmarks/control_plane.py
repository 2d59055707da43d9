"""What the control plane costs: tokens and messages per second to many clients, latency per token, scheduling per report.

The data plane computes nothing and speaks the real protocol; a bare gRPC streaming echo with the same client runs beside it, as
the ceiling that Python gRPC sets on this machine. `python -m benchmarks.control_plane` writes results/control_plane.json.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.model_shapes import DEMO_MODEL
from benchmarks.options import add_result_options, make_parser
from benchmarks.process import running
from benchmarks.result_file import RESULTS, write_result
from benchmarks.scheduling_cost import measure_scheduling
from benchmarks.screen import show
from benchmarks.serving.service import ServiceOptions, running_service

START_TIMEOUT_S = 60.0

# The paces that are tried, as shares of the bare echo's rate.
SHARES = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)

# Of the messages that one token each would make; below that the service is merging tokens, so it is past its message rate.
UNMERGED_SHARE = 0.95


@contextlib.contextmanager
def _echo(root: Path, step_ms: float) -> Iterator[str]:
    address = f"unix:{root}/echo"
    with running("benchmarks.streaming.bare_echo", ("--listen", address, "--step-ms", str(step_ms)), root / "echo.log") as echo:
        echo.wait_for_word("ready", time.monotonic() + START_TIMEOUT_S)
        yield address


@contextlib.contextmanager
def _service(root: Path, step_ms: float, *, stamps: bool) -> Iterator[str]:
    data_plane = f"benchmarks.null_data_plane --step-ms {step_ms} --engine {'stamps' if stamps else 'clock'}"
    with running_service(ServiceOptions(DEMO_MODEL, Path(tempfile.mkdtemp(dir=root)), data_plane=data_plane)) as service:
        yield service.address


def _client(address: str, streams: int, tokens: int, *, latency: bool = False) -> dict[str, float]:
    command = ["benchmarks.streaming.stream_client", "--target", address, "--streams", str(streams), "--tokens", str(tokens)]
    done = subprocess.run([sys.executable, "-m", *command, *(["--latency"] if latency else [])], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the client failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _unmerged(root: Path, streams: int, echo_rate: float) -> dict[str, float]:
    """The highest message rate at which every token still goes out in a message of its own, found by pacing the data plane."""
    best: dict[str, float] = {}
    num_merged = 0
    for share in SHARES:
        step_ms = 1000 * streams / (share * echo_rate)
        num_steps = max(64, int(2500 / step_ms))
        with _service(root, step_ms, stamps=False) as address:
            result = _client(address, streams, num_steps)
        show(f"service, a step each {step_ms:.1f} ms", result)
        if 1 / result["tokens_per_message"] >= UNMERGED_SHARE:
            best = max(best, {**result, "step_ms": step_ms}, key=lambda found: found.get("messages_per_s", 0.0))
            continue
        num_merged += 1
        if num_merged == 2:  # one may be another process that took the machine for a moment
            break
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Measures everything, prints it and writes the result file."""
    parser = make_parser("benchmarks.control_plane", __doc__)
    parser.add_argument("--streams", type=int, default=256, metavar="N", help="open at once (256)")
    parser.add_argument("--latency-step-ms", type=float, default=50.0, metavar="MS", help="pace of the latency measurement (50)")
    add_result_options(parser, "control_plane.json")
    args = parser.parse_args(argv)
    streams: int = args.streams
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with _echo(root, 0) as address:
            _client(address, streams, 32)
            measured["echo"] = _client(address, streams, 256)
        show("bare echo", measured["echo"])
        with _service(root, 0, stamps=False) as address:
            _client(address, streams, 256)
            measured["service_merging"] = _client(address, streams, 8000)
        show("service, as fast as it goes", measured["service_merging"])
        measured["service_unmerged"] = _unmerged(root, streams, measured["echo"]["messages_per_s"])
        steps = max(40, int(4000 / args.latency_step_ms))
        with _echo(root, args.latency_step_ms) as address:
            measured["echo_latency"] = _client(address, streams, steps, latency=True)
        show("bare echo, paced", measured["echo_latency"])
        with _service(root, args.latency_step_ms, stamps=True) as address:
            measured["service_latency"] = _client(address, streams, steps, latency=True)
        show("service, paced", measured["service_latency"])
    measured["scheduling"] = measure_scheduling(num_running=256, num_waiting=1000)
    show("scheduling", measured["scheduling"])
    ratios = {
        "message_rate_to_echo": measured["service_unmerged"]["messages_per_s"] / measured["echo"]["messages_per_s"],
        "token_rate_to_echo": measured["service_merging"]["tokens_per_s"] / measured["echo"]["tokens_per_s"],
        "added_latency_p50_ms": measured["service_latency"]["latency_p50_ms"] - measured["echo_latency"]["latency_p50_ms"],
        "added_latency_p99_ms": measured["service_latency"]["latency_p99_ms"] - measured["echo_latency"]["latency_p99_ms"],
    }
    show("ratios", ratios)
    about = {"streams": streams, "latency_step_ms": args.latency_step_ms}
    out = args.out or RESULTS / "control_plane.json"
    write_result(out, {**about, **measured, "ratios": ratios}, ("grpcio", "protobuf", "tokenizers"), commit=args.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
