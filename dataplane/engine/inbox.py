"""What the engine's thread is told by other threads, and the queue in which it waits for it."""

import queue
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from dataplane.memory.host_images import FetchResult
from protos.planes import BatchUpdate, StepReport


class SessionEnd(Enum):
    """Why a session is over."""

    CLIENT_DONE = auto()
    PROTOCOL_VIOLATION = auto()
    TAKEN_OVER = auto()
    SHUTTING_DOWN = auto()
    ENGINE_FAILED = auto()


class ReportSink(Protocol):
    """A session as the engine sees it. Called from the engine's thread."""

    @property
    def session_id(self) -> str:
        """For the log."""
        ...

    def has_room(self) -> bool:
        """Whether another report may be sent. When room comes back, the inbox receives RoomForReports."""
        ...

    def send(self, report: StepReport) -> None:
        """Queues a report for the control plane."""
        ...

    def update_applied(self) -> None:
        """One more update has been taken in."""
        ...

    def close(self, end: SessionEnd, description: str = "") -> None:
        """Ends the stream after what was sent."""
        ...


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A control plane said hello with the right epoch; an earlier session is over."""

    session: ReportSink


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """The next update of a session; its sequence number has been checked."""

    session: ReportSink
    update: BatchUpdate


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The stream of a session broke or was closed."""

    session: ReportSink


@dataclass(frozen=True, slots=True)
class RoomForReports:
    """A session whose reports had piled up has room again."""


@dataclass(frozen=True, slots=True)
class AdapterFetched:
    """The host cache has an image, or knows why not."""

    digest: str
    result: FetchResult


@dataclass(frozen=True, slots=True)
class HostImageEvicted:
    """The host cache dropped an image to stay within its bound."""

    digest: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the session, free everything and end the thread."""


Message = SessionOpened | UpdateReceived | SessionLost | RoomForReports | AdapterFetched | HostImageEvicted | Shutdown


class Inbox:
    """A queue of messages. Bounded by those who fill it: a session sends a limited number of updates ahead (session.py), and
    an adapter is fetched once at a time, for at most max_num_seqs requests and a few prefetches."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        """From any thread; never blocks."""
        self._queue.put(message)

    def put_fetched(self, digest: str, result: FetchResult) -> None:
        """The host cache's callback for a fetch."""
        self._queue.put(AdapterFetched(digest, result))

    def put_evicted(self, digest: str) -> None:
        """The host cache's callback for an eviction."""
        self._queue.put(HostImageEvicted(digest))

    def take(self, timeout_s: float | None) -> list[Message]:
        """Everything that is there. When nothing is, waits up to timeout_s for one message; None waits without limit."""
        messages: list[Message] = []
        try:
            messages.append(self._queue.get(block=timeout_s != 0, timeout=timeout_s or None))
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages
