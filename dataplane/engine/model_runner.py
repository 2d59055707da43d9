"""The model as the engine sees it: steps that are launched, and later waited for."""

from collections.abc import Sequence
from typing import Protocol

from dataplane.engine.step_packer import ScheduledChunk
from dataplane.runner.sampling_row import SampledToken


class LaunchedStep(Protocol):
    """A step that the device computes, or has computed."""

    def wait(self) -> tuple[SampledToken, ...]:
        """Blocks until it is computed; one token for each chunk that `is_last`, in order."""
        ...


class ModelRunner(Protocol):
    """Computes steps in the order in which they are launched."""

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the step is computed, so that the next one is best launched before this is awaited."""
        ...

    def launch(self, chunks: Sequence[ScheduledChunk]) -> LaunchedStep:
        """Starts computing the chunks. A decoding chunk may continue a token that the step launched last has yet to choose."""
        ...
