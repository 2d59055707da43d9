"""Starts the two planes as processes of their own, so that the processor time of each can be read, and stops them in order.

Like `loraplane up`, but for one plane or both another module may stand in (a baseline). Knows nothing of what is asked of it.
"""

import asyncio
import contextlib
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.process import POLL_S, Process, running

# In the data plane's log.
READY = '"event": "ready"'
_WATCH_S = 0.5
_SERVING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What is started. data_plane, control_plane: a module and options of its own, as on a command line.

    state_dir: for registry, images and logs; they stay. None: a temporary one. adapter_root: adapters may be registered by path
    from under it.
    """

    model_dir: Path
    state_dir: Path | None = None
    adapter_root: Path | None = None
    data_plane: str = "dataplane"
    control_plane: str = "controlplane"
    start_timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that answers. startup_s: from nothing to serving."""

    address: str
    planes: dict[str, Process]
    startup_s: float

    @property
    def pids(self) -> dict[str, int]:
        """The process of each plane, by its name."""
        return {name: plane.pid for name, plane in self.planes.items()}

    async def watch(self) -> None:
        """Never returns.

        Raises:
            ProcessFailedError: a plane ended.
        """
        while True:
            for plane in self.planes.values():
                plane.check()
            await asyncio.sleep(_WATCH_S)


@contextlib.contextmanager
def running_service(options: ServiceOptions) -> Iterator[RunningService]:
    """The service, for as long as the context is open.

    Raises:
        ProcessFailedError: it did not start.
    """
    with contextlib.ExitStack() as stack:
        # Sockets have short paths, which a state directory may not have.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplane-")))
        state_dir = (options.state_dir or sockets / "state").resolve()
        (state_dir / "images").mkdir(parents=True, exist_ok=True)
        started_at = time.monotonic()
        deadline = started_at + options.start_timeout_s
        data_plane, address = f"unix:{sockets}/dp", f"unix:{sockets}/cp"
        common = ["--model", str(options.model_dir), "--store-dir", str(state_dir / "images")]
        module, *extra = shlex.split(options.data_plane)
        engine = stack.enter_context(
            running(module, [*common, "--listen", data_plane, "--progress", "json", *extra], state_dir / "data-plane.log")
        )
        engine.wait_for_word(READY, deadline)
        module, *extra = shlex.split(options.control_plane)
        arguments = [*common, "--listen", address, "--data-plane", data_plane, "--state-dir", str(state_dir)]
        if options.adapter_root is not None:
            arguments += ["--adapter-root", str(options.adapter_root.resolve())]
        front = stack.enter_context(running(module, [*arguments, *extra], state_dir / "control-plane.log"))
        _wait_until_serving(address, front, deadline)
        yield RunningService(address, {"control_plane": front, "data_plane": engine}, time.monotonic() - started_at)


def _wait_until_serving(address: str, front: Process, deadline: float) -> None:
    deadline = min(deadline, time.monotonic() + _SERVING_TIMEOUT_S)
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            front.check(deadline)
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(POLL_S)
