"""Replays planned requests in an open loop: each is sent at its time, whatever became of those before. On one event loop."""

import asyncio
import time
from collections.abc import Callable, Sequence

from benchmarks.serving.driver import Driver, Prompts, RequestFailedError, Send
from benchmarks.serving.outcome import Outcome, PlannedRequest

# Sends of requests that are due at once are interleaved with reading after this many.
_SENT_AT_ONCE = 16


class Replay:
    """One share of a trace on its way through one driver."""

    def __init__(self, driver: Driver, requests: Sequence[PlannedRequest], prompts: Prompts) -> None:
        """Makes all messages; what is left for the planned times is to send them."""
        self._prepared = [(driver.prepare(request, prompts.token_ids(request)), Outcome(request)) for request in requests]
        self.num_sent = 0
        self.num_finished = 0
        self.num_tokens = 0

    async def run(self, start_at: float, clock: Callable[[], float] = time.monotonic) -> list[Outcome]:
        """Sends everything and reads it to its end. start_at: time zero of the plan, on the clock."""
        async with asyncio.TaskGroup() as tasks:
            for number, (send, outcome) in enumerate(self._prepared):
                if number % _SENT_AT_ONCE == 0:
                    await asyncio.sleep(0)
                # A timer may go off a little early, and a request must not.
                while (delay_s := start_at + outcome.request.at_s - clock()) > 0:
                    await asyncio.sleep(delay_s)
                tasks.create_task(self._stream(send, outcome, start_at, clock))
        return [outcome for _, outcome in self._prepared]

    async def _stream(self, send: Send, outcome: Outcome, start_at: float, clock: Callable[[], float]) -> None:
        def on_tokens(num_tokens: int) -> None:
            if num_tokens:
                outcome.arrivals_s.append(clock() - start_at)
                outcome.token_counts.append(num_tokens)
                self.num_tokens += num_tokens

        outcome.sent_s = clock() - start_at
        self.num_sent += 1
        try:
            outcome.server = await send(on_tokens)
        except RequestFailedError as error:
            outcome.status, outcome.detail = error.status, str(error)
        outcome.finished_s = clock() - start_at
        self.num_finished += 1
