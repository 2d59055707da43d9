"""One process of the service as `up` sees it: its log file, its progress events, its end.

Knows nothing of what the process does.
"""

import asyncio
import contextlib
import json
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
_TAIL_LINES = 20
_MAX_LINE_BYTES = 1024 * 1024


class ServiceProcess:
    """A child process whose output goes to a log; lines that are JSON objects with an "event" go to `on_event` as well."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path, on_event: Callable[[Event], None]) -> None:
        self.name = name
        self.log_path = log_path
        self._command = command
        self._on_event = on_event
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts it in a process group of its own, so that Ctrl-C reaches `up` alone, which stops things in order."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_MAX_LINE_BYTES,
            process_group=0,
        )
        self._reader = asyncio.create_task(self._read(self._process), name=f"output of {self.name}")

    async def wait(self) -> int:
        """Its exit code, once it has ended and its last output is in the log."""
        assert self._process and self._reader, "start() comes first"
        await asyncio.shield(self._reader)
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Asks it to end, and kills it when it has not within the limit."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    def tail(self) -> str:
        """The last lines of its output."""
        return "\n".join(self._tail)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                self._process.send_signal(number)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "stdout is a pipe"
        with self.log_path.open("ab", buffering=0) as log:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:  # a line over the limit; what follows it is read as a line of its own
                    line = b"(line too long)\n"
                if not line:
                    return
                log.write(line)
                self._handle(line.decode(errors="replace").rstrip())

    def _handle(self, line: str) -> None:
        event = None
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            self._on_event(event)
        else:
            self._tail.append(line)
