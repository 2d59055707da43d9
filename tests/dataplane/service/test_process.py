"""`python -m dataplane` as a process: progress, signals, and errors for people."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from tests.dataplane.service.served import TIMEOUT_S, Control, Served, admitted


@asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, asyncio.StreamReader]]:
    """A data plane and its stderr; it is gone at the end, and within the time limit."""
    root = Path(__file__).resolve().parents[3]
    command = (sys.executable, "-m", "dataplane", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=root)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield process, process.stderr
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_the_process_reports_progress_serves_and_ends_on_sigterm(served: Served, tmp_path: Path) -> None:
    async def run() -> tuple[list[dict[str, Any]], int]:
        socket = f"unix:{tmp_path}/p.sock"
        options = ["--listen", socket, "--progress", "json", "--num-pages", "8", "--device", "cpu"]
        options += ["--model", f"{served.config.model_dir}", "--store-dir", f"{tmp_path}/s"]
        events: list[dict[str, Any]] = []
        async with _process(*options) as (process, stderr):
            while not events or events[-1]["event"] != "ready":
                line = await stderr.readline()
                assert line, "the process ended before it was ready"
                if line.startswith(b"{"):
                    events.append(json.loads(line))
            async with grpc.aio.insecure_channel(socket) as channel:
                control = await Control.open(channel)
                await control.update(admit=(admitted(1, [5, 9, 17], 4),))
                tokens = await control.read_until_finished(1)
                process.send_signal(signal.SIGTERM)
                await stderr.read()
                assert tokens[1] == served.expected("", [5, 9, 17], 4)
            return events, await process.wait()

    events, code = asyncio.run(run())
    assert code == 0
    assert events[0] == {"event": "loading", "bytes_done": 0, "bytes_total": events[-2]["bytes_total"]}
    assert events[-2]["bytes_done"] == events[-2]["bytes_total"] > 0
    assert events[-1] == {"event": "ready", "listen": f"unix:{tmp_path}/p.sock"}


def test_a_directory_without_a_model_is_named_and_nothing_more(tmp_path: Path) -> None:
    async def run() -> tuple[str, int]:
        options = ["--model", f"{tmp_path}", "--store-dir", f"{tmp_path}/s", "--listen", f"unix:{tmp_path}/p"]
        async with _process(*options) as (process, stderr):
            text = (await stderr.read()).decode()
            return text, await process.wait()

    text, code = asyncio.run(run())
    assert code == 2
    assert text.startswith("dataplane: ")
    assert "config.json" in text
    assert "Traceback" not in text
