"""The engine's loop without its messages: packs, launches one step ahead, takes in the step before; times each turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.percentiles import percentiles
from benchmarks.steps.bench import StepBench
from benchmarks.steps.recorder import HostTimes
from dataplane.engine.model_runner import LaunchedStep
from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import PackedStep


@dataclass(slots=True)
class LoopTimes:
    """Seconds of each measured turn. step_s: from the end of one turn to that of the next."""

    step_s: list[float] = field(default_factory=list)
    pack_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    launches: list[HostTimes] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        """Median."""
        return _median_ms(self.step_s)

    def extend(self, other: "LoopTimes") -> None:
        """Takes in the turns of another run of the same."""
        self.step_s += other.step_s
        self.pack_s += other.pack_s
        self.wait_s += other.wait_s
        self.launches += other.launches

    def summary(self) -> dict[str, float]:
        """Medians in milliseconds; the host is the bound of a step for which it hardly waits."""
        wait_ms = _median_ms(self.wait_s)
        p10_s, p90_s = percentiles(self.step_s, 10, 90)
        return {
            "step_ms": self.step_ms,
            "step_p10_ms": p10_s * 1e3,
            "step_p90_ms": p90_s * 1e3,
            "host_ms": self.step_ms - wait_ms,
            "pack_ms": _median_ms(self.pack_s),
            "launch_ms": _median_ms([t.launch_s for t in self.launches]),
            "launch_arrays_ms": _median_ms([t.arrays_s for t in self.launches]),
            "launch_upload_ms": _median_ms([t.upload_s for t in self.launches]),
            "launch_forward_ms": _median_ms([t.forward_s for t in self.launches]),
            "launch_sampling_ms": _median_ms([t.sampling_s for t in self.launches]),
            "wait_ms": wait_ms,
            "wait_share": wait_ms / self.step_ms,
        }


class StepLoop:
    """Turns over a standing set. `prompt`, if given, makes a request that joins each step and leaves behind it.

    As in the engine, a runner that runs ahead has its next step packed and launched before the last one is awaited.
    """

    def __init__(
        self, bench: StepBench, decoding: Sequence[RequestState], prompt: Callable[[], RequestState] | None = None
    ) -> None:
        self._bench = bench
        self._decoding = list(decoding)
        self._prompt = prompt
        self._on_its_way: tuple[PackedStep, LaunchedStep] | None = None
        self._ended_at = time.perf_counter()

    def run(self, num_warmup: int, num_steps: int) -> LoopTimes:
        """Times `num_steps` turns behind `num_warmup` others."""
        for _ in range(num_warmup):
            self.turn()
        times = LoopTimes()
        for _ in range(num_steps):
            self.turn(times)
        return times

    def turn(self, times: LoopTimes | None = None) -> None:
        """One step is packed and launched, the one before is taken in."""
        bench = self._bench
        joining = [self._prompt()] if self._prompt is not None else []
        started_at = time.perf_counter()
        packed = bench.packer.pack([*self._decoding, *joining])
        packed_at = time.perf_counter()
        launched = bench.runner.launch(packed.chunks)
        launched_at = time.perf_counter()
        assert not packed.starved and all(chunk.is_last for chunk in packed.chunks), "pool or token budget is too small"
        for chunk in packed.chunks:
            chunk.request.launch(chunk.num_scheduled_tokens)
        runs_ahead, waited_s = bench.runner.runs_ahead, 0.0
        if runs_ahead:
            waited_s = self._take_in()
        self._on_its_way = packed, launched
        if not runs_ahead:
            waited_s = self._take_in()
        before, self._ended_at = self._ended_at, time.perf_counter()
        if times is not None:
            times.step_s.append(self._ended_at - before)
            times.pack_s.append(packed_at - started_at)
            times.wait_s.append(waited_s)
            times.launches.append(bench.recorder.host_times(packed_at, launched_at))

    def finish(self) -> None:
        """Waits for what is on its way and ends the standing set."""
        self._take_in()
        for request in self._decoding:
            self._bench.free(request)
        self._decoding.clear()

    def _take_in(self) -> float:
        """Seconds that the host waited."""
        on_its_way, self._on_its_way = self._on_its_way, None
        if on_its_way is None:
            return 0.0
        packed, launched = on_its_way
        started_at = time.perf_counter()
        sampled = launched.wait()
        waited_s = time.perf_counter() - started_at
        for chunk, token in zip(packed.chunks, sampled, strict=True):
            assert token.token_id is not None, "the random model computed no finite logits"
            chunk.request.append(token.token_id)
            if not chunk.is_decode:
                self._bench.free(chunk.request)
        return waited_s


class EndlessDecode:
    """A step to be called as often as one likes: where the contexts have no more room, they start again."""

    def __init__(self, make_loop: Callable[[], StepLoop], num_steps: int) -> None:
        """num_steps: that one loop has room for."""
        self._make_loop = make_loop
        self._num_steps = num_steps
        self._loop = make_loop()
        self._num_done = 0

    def __call__(self) -> None:
        """One turn."""
        if self._num_done == self._num_steps:
            self._loop.finish()
            self._loop, self._num_done = self._make_loop(), 0
        self._loop.turn()
        self._num_done += 1

    def finish(self) -> None:
        """Ends the requests."""
        self._loop.finish()


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3
