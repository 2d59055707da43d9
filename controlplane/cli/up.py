"""`loraplane up`: both planes and the embedded Redis on one machine, from one command, until Ctrl-C."""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.cli import up_options
from controlplane.cli.arguments import Subparsers
from controlplane.cli.connection import DEFAULT_SERVER, ConnectionOptions
from controlplane.cli.failures import EXIT_USAGE, CommandError
from controlplane.cli.output import Output, human_seconds
from controlplane.cli.process import Event, ServiceProcess
from controlplane.cli.up_options import UpConfig
from controlplane.cli.up_progress import StartProgress

# From a started control plane to health SERVING; the models are loaded by then.
_SERVING_TIMEOUT_S = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_command(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `up`."""
    parser = commands.add_parser("up", parents=[common], help="start the whole service on this machine", description=__doc__)
    up_options.add_options(parser)
    parser.set_defaults(command=_up)


def _up(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    config = up_options.config_from(args, DEFAULT_SERVER)
    if not (config.model / "config.json").is_file():
        raise CommandError(f"--model {config.model} is not a model directory: it has no config.json", EXIT_USAGE)
    if config.num_data_planes < 1:
        raise CommandError(f"--data-planes is {config.num_data_planes}; at least 1 is needed", EXIT_USAGE)
    # Sockets have short paths (the system allows about 100 characters), which a state directory may not have.
    with tempfile.TemporaryDirectory(prefix="loraplane-") as socket_dir:
        return asyncio.run(_run(config, Path(socket_dir), output))


async def _run(config: UpConfig, socket_dir: Path, output: Output) -> int:
    return await Service(config, socket_dir, output).run()


class Service:
    """The processes of one `up`: started in order, watched, and stopped in the reverse order."""

    def __init__(self, config: UpConfig, socket_dir: Path, output: Output) -> None:
        self._config = config
        self._output = output
        self._progress = StartProgress(output)
        self._sockets = [f"unix:{socket_dir}/data-plane-{number}.sock" for number in range(config.num_data_planes)]
        self._ready = [asyncio.Event() for _ in self._sockets]
        self._data_planes = [self._data_plane(number) for number in range(config.num_data_planes)]
        self._control_plane = ServiceProcess(
            "control-plane",
            control_plane_command(config, self._sockets),
            config.log_dir / "control-plane.log",
            lambda event: None,
        )
        # Done when a signal asks to stop; an exception when a process ended by itself.
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Runs until a signal; returns 0.

        Raises:
            CommandError: the service did not start, or one of its processes ended by itself.
        """
        for number in _SIGNALS:
            # Under nohup it outlives its terminal. SIGINT is taken all the same: shells ignore it for background jobs.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        begin = time.monotonic()
        start = asyncio.create_task(self._start())
        try:
            timeout_s = self._config.start_timeout_s
            await asyncio.wait((start, self._end), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not self._end.done():
                if not start.done():
                    raise CommandError(f"the service has not started after {timeout_s:g} s (--start-timeout)")
                await start
                self._announce(time.monotonic() - begin)
            await self._end
        finally:
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            await self._stop()
        return 0

    async def _start(self) -> None:
        with self._progress:
            for process in self._data_planes:
                await self._launch(process)
            for ready in self._ready:
                await ready.wait()
        await self._launch(self._control_plane)
        try:
            async with asyncio.timeout(_SERVING_TIMEOUT_S):
                await _wait_until_serving(self._config.listen[0])
        except TimeoutError:
            reason = f"the control plane is not serving {_SERVING_TIMEOUT_S:g} s after its start"
            raise CommandError(_with_log(reason, self._control_plane)) from None

    async def _launch(self, process: ServiceProcess) -> None:
        await process.start()
        self._watchers.append(asyncio.create_task(self._watch(process), name=f"end of {process.name}"))

    async def _watch(self, process: ServiceProcess) -> None:
        exit_code = await process.wait()
        if not self._end.done():
            how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
            self._end.set_exception(CommandError(_with_log(f"the {process.name} {how}", process)))

    async def _stop(self) -> None:
        """The control plane first: it finishes its requests, for which it needs the data planes."""
        if not self._end.done():
            self._end.set_result(None)
        self._output.note("stopping; Ctrl-C again stops at once")
        await self._control_plane.stop(self._config.stop_timeout_s)
        await asyncio.gather(*(process.stop(self._config.stop_timeout_s) for process in self._data_planes))
        await asyncio.gather(*self._watchers)

    def _on_signal(self) -> None:
        if not self._end.done():
            self._end.set_result(None)
            return
        for process in (self._control_plane, *self._data_planes):
            process.kill()

    def _announce(self, duration_s: float) -> None:
        address = self._config.listen[0]
        if self._output.as_json:
            self._output.json({"event": "ready", "listen": list(self._config.listen), "state_dir": str(self._config.state_dir)})
            return
        server = "" if address == DEFAULT_SERVER else f" --server {address}"
        self._output.console.print(
            f"loraplane serves {self._config.model} at {address} ({human_seconds(duration_s)})", markup=False
        )
        has_text = (self._config.model / "tokenizer.json").is_file()
        prompt = '"Once upon a time"' if has_text else "--token-ids 1,2,3"
        for example in (f"generate {prompt}", "adapters register NAME DIRECTORY", "status"):
            self._output.note(f"  loraplane {example}{server}")
        self._output.note(f"logs are in {self._config.log_dir}; Ctrl-C stops it")

    def _data_plane(self, number: int) -> ServiceProcess:
        name = f"data-plane-{number}"

        def on_event(event: Event) -> None:
            self._progress.update(name, event)
            if event["event"] == "ready":
                self._ready[number].set()

        command = data_plane_command(self._config, self._sockets[number])
        return ServiceProcess(name, command, self._config.log_dir / f"{name}.log", on_event)


def data_plane_command(config: UpConfig, listen: str) -> list[str]:
    """How a data plane is started."""
    command = [sys.executable, "-u", "-m", "dataplane", f"--model={config.model}", f"--listen={listen}"]
    return [*command, f"--store-dir={config.store_dir}", "--progress=json", *config.data_plane_arguments]


def control_plane_command(config: UpConfig, data_planes: list[str]) -> list[str]:
    """How the control plane is started."""
    command = [sys.executable, "-u", "-m", "controlplane", f"--model={config.model}"]
    command += [f"--data-plane={address}" for address in data_planes]
    command += [f"--listen={address}" for address in config.listen]
    command += [f"--state-dir={config.state_dir}", f"--store-dir={config.store_dir}"]
    return [*command, *(f"--adapter-root={root}" for root in config.adapter_roots), *config.control_plane_arguments]


async def _wait_until_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        # The server pushes each change of state, so nothing is polled.
        async for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=_SERVING_TIMEOUT_S, wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


def _with_log(reason: str, process: ServiceProcess) -> str:
    return f"{reason}; the end of {process.log_path}:\n{process.tail()}"
