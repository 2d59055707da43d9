"""Engines with no cost of their own, for measuring what the control plane costs: each step gives every request one token.

They take the seat of `NullEngine` behind the real protocol, and book no pages.
"""

from dataclasses import replace

from benchmarks.null_engine import NullConfig, NullEngine
from benchmarks.streaming.stamps import VOCAB_SIZE, stamp
from protos.planes import (
    BatchUpdate,
    EngineFinishReason,
    EngineState,
    FinishedRequest,
    PoolCounts,
    StepReport,
    StepTiming,
)

# Tokens of plain text in about any tokenizer.
FIRST_TOKEN, NUM_TOKENS = 40, 64


class ClockEngine(NullEngine):
    """Counts down the tokens of each request; tokens follow the number of the step."""

    def __init__(self, config: NullConfig, epoch: int) -> None:
        super().__init__(config, epoch)
        self._remaining: dict[int, int] = {}
        self._reported_update = 0

    def open_session(self) -> StepReport:
        """The first report of a session."""
        self._sequence, self._applied, self._reported_update = 1, 0, 0
        held, self._remaining = tuple(self._remaining), {}
        return StepReport(1, 0, pool=self.counts, state=EngineState(self.epoch, held))

    def apply(self, update: BatchUpdate) -> None:
        """Takes in an update."""
        self._applied = update.sequence
        for key in update.abort:
            self._remaining.pop(key, None)
        for admitted in update.admit:
            self._remaining[admitted.request_key] = admitted.sampling.max_tokens - admitted.num_output_tokens

    def step(self) -> StepReport | None:
        """One token for everybody; None while there is nothing to say."""
        if not self._remaining and self._applied == self._reported_update:
            return None
        self._sequence += 1
        self._reported_update = self._applied
        keys = tuple(self._remaining)
        finished = []
        for key in keys:
            self._remaining[key] -= 1
            if not self._remaining[key]:
                finished.append(FinishedRequest(key, EngineFinishReason.LENGTH))
                del self._remaining[key]
        return StepReport(
            sequence=self._sequence,
            applied_update=self._applied,
            request_keys=keys,
            token_ids=(self._token(),) * len(keys),
            finished=tuple(finished),
            pool=self.counts,
            timing=StepTiming(self._sequence, 0.0, 0, len(keys)),
        )

    @property
    def counts(self) -> PoolCounts:
        """All pages are free."""
        return PoolCounts(free_pages=self.config.num_pages)

    def _token(self) -> int:
        return FIRST_TOKEN + self._sequence % NUM_TOKENS


class StampEngine(ClockEngine):
    """Tokens are the time at which their step was made."""

    def __init__(self, config: NullConfig, epoch: int) -> None:
        super().__init__(replace(config, vocab_size=VOCAB_SIZE), epoch)

    def _token(self) -> int:
        return stamp()
