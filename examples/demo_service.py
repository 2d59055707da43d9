"""Starts `loraplane up` on the demo's base model for the length of a `with`, and stops it cleanly.

Knows the command line of the service and nothing of what is asked of it.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.loraplane.v1 import system_pb2, system_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
DEMO_DIR = ROOT / "examples" / "demo"
START_TIMEOUT_S = 120.0
# What the service gives its requests to finish, and what the demo gives the service to stop, the second time at once.
DRAIN_TIMEOUT_S, STOP_TIMEOUT_S, KILL_TIMEOUT_S = 10.0, 40.0, 10.0


class ServiceFailedError(RuntimeError):
    """The service did not start or did not stop as it should; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    address: str
    page_bytes: int


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_service(state_dir: Path, num_pages: int, max_model_len: int) -> Iterator[Service]:
    """Both planes and the registry, answering when the body runs; stopped with SIGINT afterwards, as Ctrl-C would."""
    address, log = f"127.0.0.1:{free_port()}", state_dir / "service.log"
    command = [
        *(sys.executable, "-m", "controlplane.cli.main", "up"),
        *("--model", str(DEMO_DIR / "base"), "--listen", address, "--state-dir", str(state_dir)),
        *("--adapter-root", str(DEMO_DIR / "adapters"), "--dtype", "float32", "--device", "cpu"),
        *("--num-pages", str(num_pages), "--max-model-len", str(max_model_len)),
        *("--stop-timeout", f"{DRAIN_TIMEOUT_S:g}"),
    ]
    # Its own session: a Ctrl-C at the terminal reaches the demo alone, which then stops the service in order.
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True) as process:
        try:
            yield _wait_until_serving(process, address, log)
        except BaseException:
            _stop(process)
            raise
        if (status := _stop(process)) != 0:
            raise ServiceFailedError(f"The service stopped with status {status}, expected 0.\n{_tail(log)}")


def _wait_until_serving(process: subprocess.Popen[bytes], address: str, log: Path) -> Service:
    deadline = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(address) as channel:
        system = system_pb2_grpc.SystemServiceStub(channel)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServiceFailedError(f"The service ended at start with status {process.returncode}.\n{_tail(log)}")
            try:
                info = system.GetServerInfo(system_pb2.GetServerInfoRequest(), timeout=2, wait_for_ready=True)
            except grpc.RpcError:
                continue
            if info.data_planes:
                return Service(address, info.data_planes[0].page_bytes)
            time.sleep(0.2)
    raise ServiceFailedError(f"The service did not answer within {START_TIMEOUT_S:.0f} s.\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> int:
    """The exit status. A second SIGINT makes the service stop at once, with all its processes."""
    for timeout_s in (STOP_TIMEOUT_S, KILL_TIMEOUT_S):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout_s)
    process.kill()
    return process.wait()


def _tail(log: Path, num_lines: int = 15) -> str:
    lines: Sequence[str] = log.read_text(errors="replace").splitlines()
    return "\n".join(["Its log ends with:", *lines[-num_lines:]])
