"""`loraplane up` against small processes that speak as the two planes do: progress events, health, an orderly end."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from controlplane.cli import up, up_options
from controlplane.cli.main import build_parser, main
from controlplane.cli.process import Event, ServiceProcess
from controlplane.cli.up_options import UpConfig
from tests.waiting import PATIENCE_S

DATA_PLANE = """
import json, signal, sys
for done in (0, 50, 100):
    print(json.dumps({"event": "loading", "bytes_done": done, "bytes_total": 100}), file=sys.stderr, flush=True)
print("a line for the log", flush=True)
print(json.dumps({"event": "ready", "listen": sys.argv[1]}), file=sys.stderr, flush=True)
signal.sigwait({signal.SIGTERM})
"""

CONTROL_PLANE = """
import signal, sys
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port(sys.argv[1])
server.start()
signal.signal(signal.SIGTERM, lambda *_: server.stop(0))
server.wait_for_termination()
print("ended in order", flush=True)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes for a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def address() -> str:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# Before a program: none outlives its test for long, whatever becomes of that.
END_BY_ITSELF = "import signal; signal.alarm(60)\n"


@pytest.fixture
def small_planes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replaces the programs of the two planes."""

    def install(data_plane: str, control_plane: str) -> None:
        def control_command(config: UpConfig, data_planes: list[str]) -> list[str]:
            return [sys.executable, "-u", "-c", END_BY_ITSELF + control_plane, config.listen[0]]

        def data_command(config: UpConfig, listen: str) -> list[str]:
            return [sys.executable, "-u", "-c", END_BY_ITSELF + data_plane, listen]

        monkeypatch.setattr(up, "data_plane_command", data_command)
        monkeypatch.setattr(up, "control_plane_command", control_command)

    return install


def run_up(model: Path, address: str, state: Path, *options: str) -> int:
    return main(["up", f"--model={model}", f"--listen={address}", f"--state-dir={state}", "--json", *options], {})


def test_up_starts_announces_and_stops_in_order(
    model: Path,
    address: str,
    tmp_path: Path,
    small_planes: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_planes(DATA_PLANE, CONTROL_PLANE)
    announce = up.Service._announce

    def announce_and_interrupt(self: up.Service, duration_s: float) -> None:
        announce(self, duration_s)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(up.Service, "_announce", announce_and_interrupt)
    assert run_up(model, address, tmp_path / "state", "--data-planes=2") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1] == {"event": "ready", "listen": [address], "state_dir": str(tmp_path / "state")}
    for name in ("data-plane-0", "data-plane-1"):
        mine = [event for event in events if event.get("process") == name]
        assert [event["event"] for event in mine] == ["loading", "loading", "loading", "ready"]
    assert "ended in order" in (tmp_path / "state" / "logs" / "control-plane.log").read_text()
    assert "a line for the log" in (tmp_path / "state" / "logs" / "data-plane-0.log").read_text()


@pytest.mark.parametrize(
    "planes", [("raise SystemExit('no such weights')", CONTROL_PLANE), (DATA_PLANE, "raise SystemExit('no such weights')")]
)
def test_a_plane_that_dies_ends_up_with_its_last_words(
    planes: tuple[str, str],
    model: Path,
    address: str,
    tmp_path: Path,
    small_planes: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_planes(*planes)
    assert run_up(model, address, tmp_path / "state") == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    message = last["error"]["message"]
    assert "ended with exit code 1" in message and "no such weights" in message and str(tmp_path / "state" / "logs") in message


def test_a_model_that_never_loads_meets_the_time_limit(
    model: Path, address: str, tmp_path: Path, small_planes: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    small_planes("import signal; signal.sigwait({signal.SIGTERM})", CONTROL_PLANE)
    assert run_up(model, address, tmp_path / "state", "--start-timeout=0.5") == 1
    assert "has not started after 0.5 s" in capsys.readouterr().out


def test_a_directory_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", f"--model={tmp_path}"], {}) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_options_of_the_planes_are_handed_on(model: Path, tmp_path: Path) -> None:
    argv = ["up", f"--model={model}", f"--state-dir={tmp_path}", "--num-pages=40", "--dtype", "float32", "--max-waiting=7"]
    argv += ["--no-overlap"]
    args = build_parser().parse_args([*argv, f"--adapter-root={tmp_path}", "--listen=unix:/a", "--listen=127.0.0.1:1"])
    config = up_options.config_from(args, "127.0.0.1:50051")
    data_plane = up.data_plane_command(config, "unix:/dp")
    assert {"--num-pages=40", "--dtype=float32", "--listen=unix:/dp", f"--model={model}", "--progress=json"} <= set(data_plane)
    assert "--no-overlap" in data_plane and "--no-cuda-graphs" not in data_plane
    assert "--max-waiting=7" not in data_plane
    control_plane = up.control_plane_command(config, ["unix:/dp"])
    assert {"--max-waiting=7", "--data-plane=unix:/dp", "--listen=unix:/a", "--listen=127.0.0.1:1"} <= set(control_plane)
    assert {f"--state-dir={tmp_path}", f"--adapter-root={tmp_path}"} <= set(control_plane)
    assert {f"--store-dir={tmp_path}/images"} <= set(control_plane) & set(data_plane)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async def scenario() -> int:
        started = asyncio.Event()
        events: list[Event] = []

        def on_event(event: Event) -> None:
            events.append(event)
            started.set()

        code = END_BY_ITSELF + 'signal.signal(signal.SIGTERM, signal.SIG_IGN); print(\'{"event": "on"}\'); signal.pause()'
        process = ServiceProcess("stubborn", [sys.executable, "-u", "-c", code], tmp_path / "log", on_event)
        await process.start()
        await asyncio.wait_for(started.wait(), PATIENCE_S)
        await process.stop(timeout_s=0.1)
        assert events == [{"event": "on"}]
        return await process.wait()

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_output_keeps_the_last_lines_and_long_ones_do_no_harm(tmp_path: Path) -> None:
    async def scenario() -> str:
        code = "print('x' * 3_000_000); print('{broken'); print('last')"
        process = ServiceProcess("talker", [sys.executable, "-u", "-c", code], tmp_path / "log", lambda event: None)
        await process.start()
        assert await process.wait() == 0
        return process.tail()

    tail = asyncio.run(scenario())
    assert tail.endswith("{broken\nlast") and "(line too long)" in tail
