"""One session with a control plane: its reports on their way out, and how many updates it may send ahead.

The bridge between the engine's thread and the event loop; knows neither the engine nor gRPC.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from dataplane.engine.inbox import SessionEnd
from protos.planes import StepReport

# Reports that may wait for a control plane that does not read. The engine pauses when they are full.
MAX_WAITING_REPORTS = 64
# Updates that may wait for the engine. The stream is not read further when they are full.
MAX_WAITING_UPDATES = 64


class SessionEndedError(Exception):
    """The session is over, and why."""

    def __init__(self, end: SessionEnd, description: str) -> None:
        self.end = end
        super().__init__(description or end.name)


class Session:
    """A ReportSink whose other end is read by the event loop it was made on."""

    def __init__(self, session_id: str, on_room: Callable[[], None]) -> None:
        """on_room: called from the event loop when reports were read after the engine had found no room."""
        self._session_id = session_id
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        # Appended by the engine, taken from by the event loop; each operation of a deque is atomic.
        self._reports: deque[StepReport] = deque()
        # Set by the engine when it found no room, cleared by the event loop when it tells of room.
        self._awaits_room = False
        self._ended: SessionEndedError | None = None
        self._has_news = asyncio.Event()
        self._update_credit = asyncio.Semaphore(MAX_WAITING_UPDATES)

    @property
    def session_id(self) -> str:
        """For the log."""
        return self._session_id

    def has_room(self) -> bool:
        """Whether another report may be sent. From the engine's thread, the only one that adds reports."""
        if len(self._reports) < MAX_WAITING_REPORTS:
            return True
        # Looked at again after saying so: reports read in between were read by someone who did not know yet.
        self._awaits_room = True
        return len(self._reports) < MAX_WAITING_REPORTS

    def send(self, report: StepReport) -> None:
        """Queues a report. From the engine's thread."""
        assert self.has_room(), f"session {self._session_id}: {len(self._reports)} reports wait already"
        self._reports.append(report)
        self._call(self._has_news.set)

    def update_applied(self) -> None:
        """Gives back one update's credit. From the engine's thread."""
        self._call(self._update_credit.release)

    def close(self, end: SessionEnd, description: str = "") -> None:
        """Ends the session once its reports are read. From any thread; the first reason counts."""
        if self._ended is None:
            self._ended = SessionEndedError(end, description)
        self._call(self._has_news.set)

    async def wait_for_credit(self) -> None:
        """Waits until the engine can be sent another update."""
        await self._update_credit.acquire()

    async def next_reports(self) -> tuple[StepReport, ...]:
        """All reports that wait, oldest first; at least one.

        Raises:
            SessionEndedError: there is none, and none will come.
        """
        while not self._reports:
            if self._ended is not None:
                raise self._ended
            # Cleared before looking again: a report that comes in between sets it anew.
            self._has_news.clear()
            if not self._reports and self._ended is None:
                await self._has_news.wait()
        reports = tuple(self._reports.popleft() for _ in range(len(self._reports)))
        if self._awaits_room:
            self._awaits_room = False
            self._on_room()
        return reports

    def _call(self, callback: Callable[[], object]) -> None:
        """Runs it on the event loop. One that is closed has nobody left who waits."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)
