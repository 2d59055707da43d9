"""Static batches of one adapter at a time, over requests that arrive in an open loop; and what each request saw of them.

Pure of any model: it is told how to generate, what time it is and how to wait.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.serving.outcome import OK, Outcome, PlannedRequest

# Of requests that were still waiting, or under way, when the time was up.
TIME_IS_UP = "TIME_IS_UP"


class Generator(Protocol):
    """What computes a batch."""

    def generate(self, requests: Sequence[PlannedRequest], until_s: float) -> Sequence[float]:
        """Computes requests of one adapter until the longest has all its tokens; the times at which each next token was there.

        until_s: when it may give up, on the clock of the run.

        Raises:
            BatchTooLargeError: there is no memory for so many.
        """
        ...


class BatchTooLargeError(Exception):
    """A batch did not fit in memory."""


@dataclass(slots=True)
class BatchLimits:
    """max_tokens: of a batch at its longest, padding included; learned if it was too much."""

    max_requests: int
    max_tokens: int

    def padded_tokens(self, requests: Sequence[PlannedRequest]) -> int:
        """Tokens in KV at the end of a batch: prompts are padded to the longest, and all go on until the last has its output."""
        return len(requests) * (max(r.input_tokens for r in requests) + max(r.output_tokens for r in requests))

    def choose(self, waiting: Sequence[PlannedRequest]) -> list[PlannedRequest]:
        """The oldest request, and as many behind it of the same adapter as fit, oldest first."""
        chosen: list[PlannedRequest] = []
        for request in waiting:
            if len(chosen) == self.max_requests:
                break
            if request.adapter == waiting[0].adapter and self._fits([*chosen, request]):
                chosen.append(request)
        return chosen

    def _fits(self, requests: Sequence[PlannedRequest]) -> bool:
        return len(requests) == 1 or self.padded_tokens(requests) <= self.max_tokens


@dataclass(slots=True)
class BatchCounts:
    """What the batches did, padding included. steps: tokens in a row. computed_tokens: steps of every request of the batch."""

    batches: int = 0
    steps: int = 0
    computed_tokens: int = 0
    too_large: int = 0


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since the start of the run."""

    now: Callable[[], float]
    sleep: Callable[[float], None]


def serve_static(
    requests: Sequence[PlannedRequest],
    generator: Generator,
    limits: BatchLimits,
    max_seconds: float,
    clock: Clock,
    on_batch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> tuple[list[Outcome], BatchCounts]:
    """Serves requests in the order of their arrival, batch after batch, until all are done or the time is up.

    A request ends when its own last token is there, though its batch goes on: as if tokens were streamed.
    """
    outcomes = {request.index: Outcome(request, sent_s=request.at_s, status=TIME_IS_UP) for request in requests}
    counts = BatchCounts()
    waiting = sorted(requests, key=lambda request: request.at_s)
    while waiting and clock.now() < max_seconds:
        arrived = [request for request in waiting if request.at_s <= clock.now()]
        if not arrived:
            clock.sleep(min(waiting[0].at_s, max_seconds) - clock.now())
            continue
        batch = limits.choose(arrived)
        try:
            token_times = generator.generate(batch, max_seconds)
        except BatchTooLargeError:
            if len(batch) == 1:
                raise
            counts.too_large += 1
            limits.max_tokens = limits.padded_tokens(batch) // 2
            continue
        taken = {request.index for request in batch}
        waiting = [request for request in waiting if request.index not in taken]
        counts.batches += 1
        counts.steps += len(token_times)
        counts.computed_tokens += len(token_times) * len(batch)
        for request in batch:
            _take(outcomes[request.index], token_times)
        on_batch([outcomes[request.index] for request in batch])
    return [outcomes[request.index] for request in requests], counts


def _take(outcome: Outcome, token_times: Sequence[float]) -> None:
    outcome.arrivals_s = list(token_times[: outcome.request.output_tokens])
    outcome.token_counts = [1] * len(outcome.arrivals_s)
    outcome.finished_s = outcome.arrivals_s[-1] if outcome.arrivals_s else outcome.sent_s
    if len(outcome.arrivals_s) == outcome.request.output_tokens:
        outcome.status = OK
