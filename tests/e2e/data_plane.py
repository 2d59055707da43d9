"""A data plane that a test stops, starts again and slows down. Knows nothing of the control plane."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dataplane.assembly import DataPlane, load_data_plane
from dataplane.config import DataPlaneConfig
from dataplane.engine.model_runner import LaunchedStep, ModelRunner
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.service.server import DataPlaneServer


@dataclass(frozen=True)
class Steering:
    """How a test changes the pace of a data plane."""

    extra_step_s: float
    runs_ahead: bool


class _SteeredRunner:
    """A model runner whose steps take longer, or that is waited for late as on a GPU."""

    def __init__(self, runner: ModelRunner, steering: Steering) -> None:
        self._runner = runner
        self._extra_step_s = steering.extra_step_s
        self.runs_ahead = steering.runs_ahead or runner.runs_ahead

    def launch(self, chunks: Sequence[ScheduledChunk]) -> LaunchedStep:
        """Starts computing the chunks, some time later."""
        time.sleep(self._extra_step_s)  # on purpose: this is how long the device takes
        return self._runner.launch(chunks)


class RunningDataPlane:
    """A data plane that can be stopped and started again, with another epoch and an empty pool."""

    def __init__(self, config: DataPlaneConfig, steering: Steering) -> None:
        self._config = config
        self._steering = steering
        self._data_plane: DataPlane | None = None
        self._server: DataPlaneServer | None = None

    async def start(self) -> None:
        """Loads and listens."""
        self._data_plane = load_data_plane(self._config)
        self._data_plane.engine._runner = _SteeredRunner(self._data_plane.engine._runner, self._steering)
        self._server = DataPlaneServer(self._data_plane, self._config.listen, self._config.stop_timeout_s)
        await self._server.start()

    async def stop(self) -> None:
        """Stops as on SIGTERM, then checks every page."""
        assert self._server is not None and self._data_plane is not None
        await self._server.stop()
        # The engine's own check at its end raises in its thread; this one, after the thread has ended, fails the test.
        self._data_plane.engine.check_integrity()
        num_running = self._data_plane.engine.num_running
        assert num_running == 0, f"{num_running} requests still run"
