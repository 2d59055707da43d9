"""How much slower a decode step is while adapters stream in without a pause. Knows a step only as something that is launched."""

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from adapter_store.image import AdapterImage
from dataplane.memory.adapter_copy import AdapterCopier, AdapterCopy

# On their way at once: more than the device copies during one step.
BYTES_ON_THEIR_WAY = 512 << 20
NUM_ROUNDS = 3
NUM_STEPS = 60


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Medians of all steps, and the rate at which adapters were copied meanwhile."""

    quiet_ms: float
    loading_ms: float
    gb_per_s: float

    @property
    def ratio(self) -> float:
        """A step while adapters stream in, over one while none do."""
        return self.loading_ms / self.quiet_ms


class LoadStream:
    """Loads adapters one after the other into the same pages in turn, so that the copier always has work."""

    def __init__(self, copier: AdapterCopier, images: Sequence[AdapterImage], places: Sequence[Sequence[int]]) -> None:
        """places: the pages of each load in turn, which no step reads."""
        self._copier = copier
        self._loads: Iterator[tuple[AdapterImage, Sequence[int]]] = zip(itertools.cycle(images), itertools.cycle(places))
        self._size_bytes = images[0].size_bytes
        self._copies: deque[AdapterCopy] = deque()
        self.num_done = 0

    def advance(self) -> None:
        """Starts as many loads as were done since."""
        while self._copies and self._copies[0].is_done():
            self._copies.popleft()
            self.num_done += 1
        while len(self._copies) * self._size_bytes < BYTES_ON_THEIR_WAY:
            self._copies.append(self._copier.start(*next(self._loads)))

    def drain(self) -> None:
        """Waits for all that are on their way."""
        while self._copies:
            self._copies.popleft().wait()


def measure_slowdown(
    step: Callable[[], None], copier: AdapterCopier, images: Sequence[AdapterImage], places: Sequence[Sequence[int]]
) -> Slowdown:
    """Rounds of steps in turns, with and without loads; one step is launched while the one before computes, as in the engine.

    step: launches one decode step on the current stream. images, places: what is loaded meanwhile, and where to.
    """
    stream = LoadStream(copier, images, places)
    quiet: list[float] = []
    loading: list[float] = []
    num_loaded = 0
    for i in range(2 * NUM_ROUNDS + 1):
        is_loading = i % 2 == 1
        before = stream.num_done
        times = _run(step, stream.advance if is_loading else lambda: None)
        if is_loading:
            num_loaded += stream.num_done - before
            stream.drain()
        if i > 0:  # the first round warms up
            (loading if is_loading else quiet).extend(times)
    loading_s = sum(loading) / 1e3 * NUM_STEPS / (NUM_STEPS - 1)
    rate = num_loaded * images[0].size_bytes / loading_s / 1e9
    return Slowdown(statistics.median(quiet), statistics.median(loading), rate)


def _run(step: Callable[[], None], between: Callable[[], None]) -> list[float]:
    """Milliseconds from the end of one step to the end of the next."""
    torch.cuda.synchronize()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_STEPS)]  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for i, end in enumerate(ends):
        between()
        step()
        end.record()
        if i > 0:
            ends[i - 1].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(ends)]
