"""Client processes: each replays a share of the trace on an event loop of its own, so that no client is the bottleneck.

They are started once and take one run after another. Knows nothing of what is replayed against whom.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

import uvloop

from benchmarks.serving.driver import Driver, Prompts, Target
from benchmarks.serving.outcome import Outcome, PlannedRequest
from benchmarks.serving.replay import Replay

# Between "all are ready" and time zero: long enough for that word to reach every process.
_START_DELAY_S = 0.1
_PROGRESS_S = 0.25
_STOP_TIMEOUT_S = 5.0


class ClientFailedError(RuntimeError):
    """A client process ended in the middle of a run."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What one process is to replay."""

    requests: tuple[PlannedRequest, ...]
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    num_sent: int = 0
    num_finished: int = 0
    num_tokens: int = 0

    def __add__(self, other: "Progress") -> "Progress":
        return Progress(
            self.num_sent + other.num_sent, self.num_finished + other.num_finished, self.num_tokens + other.num_tokens
        )


@dataclass(frozen=True, slots=True)
class _Done:
    outcomes: list[Outcome]
    cpu_s: float


@dataclass(frozen=True, slots=True)
class ClientRun:
    """What all processes saw. start_at: time zero (time.monotonic). wall_s: from it to the end of the last stream. cpu_s: of each
    process.
    """

    outcomes: tuple[Outcome, ...]
    start_at: float
    wall_s: float
    cpu_s: tuple[float, ...]


class Clients:
    """A number of client processes of one target. Use as a context manager; they end with it."""

    def __init__(self, target: Target, num_processes: int) -> None:
        self._executor = ThreadPoolExecutor(num_processes, thread_name_prefix="client")
        # Not forked: gRPC does not survive that.
        context = multiprocessing.get_context("spawn")
        self._clients: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        for number in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client_main, args=(theirs, target), name=f"client-{number}", daemon=True)
            process.start()
            theirs.close()
            self._clients.append((process, ours))

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Ends the processes."""
        for process, connection in self._clients:
            if error is None:
                connection.close()  # who reads its end takes that as the word to stop
            else:
                process.terminate()  # a thread of ours may still read from it, so that closing would tell it nothing
        for process, connection in self._clients:
            process.join(_STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._executor.shutdown()

    async def run(
        self,
        requests: Sequence[PlannedRequest],
        prompts: Prompts,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> ClientRun:
        """Replays the requests, dealt out to the processes in turn.

        Raises:
            ClientFailedError: a process ended.
        """
        for number, (_, connection) in enumerate(self._clients):
            connection.send(_Share(tuple(requests[number :: len(self._clients)]), prompts))
        for number in range(len(self._clients)):
            await self._receive(number)  # its messages are made
        start_at = time.monotonic() + _START_DELAY_S
        for _, connection in self._clients:
            connection.send(start_at)
        seen = [Progress()] * len(self._clients)

        def on_share(number: int, progress: Progress) -> None:
            seen[number] = progress
            on_progress(sum(seen, Progress()))

        done = await asyncio.gather(*(self._finish(number, on_share) for number in range(len(self._clients))))
        outcomes = sorted((o for share in done for o in share.outcomes), key=lambda outcome: outcome.request.index)
        wall_s = max((outcome.finished_s for outcome in outcomes), default=0.0)
        return ClientRun(tuple(outcomes), start_at, wall_s, tuple(share.cpu_s for share in done))

    async def _finish(self, number: int, on_share: Callable[[int, Progress], None]) -> _Done:
        while True:
            message = await self._receive(number)
            if isinstance(message, _Done):
                return message
            assert isinstance(message, Progress), message
            on_share(number, message)

    async def _receive(self, number: int) -> object:
        process, connection = self._clients[number]
        try:
            message: object = await asyncio.get_running_loop().run_in_executor(self._executor, connection.recv)
        except (EOFError, OSError):
            process.join(_STOP_TIMEOUT_S)
            raise ClientFailedError(f"{process.name} ended with exit code {process.exitcode} in the middle of a run") from None
        return message


def _client_main(connection: Connection, target: Target) -> None:
    """The life of a client process: one share after another, until the other end of the pipe closes."""
    # Ctrl-C is for the parent, which closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_shares(connection, target))


async def _serve_shares(connection: Connection, target: Target) -> None:
    driver = target.open()
    try:
        while True:
            share = await asyncio.to_thread(connection.recv)
            assert isinstance(share, _Share), share
            await _replay_share(connection, driver, share)
    finally:
        await driver.close()


async def _replay_share(connection: Connection, driver: Driver, share: _Share) -> None:
    replay = Replay(driver, share.requests, share.prompts)
    # The messages live until the run ends; a collection that looks at them all would delay every arrival.
    gc.collect()
    gc.freeze()
    connection.send("ready")
    start_at = await asyncio.to_thread(connection.recv)
    cpu_before_s = time.process_time()

    async def tell_progress() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            connection.send(Progress(replay.num_sent, replay.num_finished, replay.num_tokens))

    telling = asyncio.create_task(tell_progress())
    try:
        outcomes = await replay.run(start_at)
    finally:
        telling.cancel()
    cpu_s = time.process_time() - cpu_before_s
    gc.unfreeze()
    connection.send(_Done(outcomes, cpu_s))
