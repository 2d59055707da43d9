"""Which runs a benchmark makes, one after the other in one start of the service. Knows no service and no clock."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.trace import TraceRequest, read_trace
from benchmarks.workload import LENGTHS, SATURATED_REQUESTS, SEED, Popularity, open_loop_trace, saturated_trace


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests a second: a number, or a share of what the service did when it was saturated."""

    value: float
    is_share: bool = False

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """From "12.5" or "80%"."""
        number = float(text.removesuffix("%"))
        if not number > 0:
            raise ValueError(f"a rate of {text}; it must be above 0")
        return cls(number / 100, True) if text.endswith("%") else cls(number)


@dataclass(frozen=True, slots=True)
class FixedLoad:
    """So many requests at once, all of the same lengths; adapters are dealt to them in turn."""

    num_requests: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> "FixedLoad":
        """From "64x128x256"."""
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
        if len(numbers) != 3 or min(numbers) < 1:
            raise ValueError(f"a fixed load of {text!r}; it has the form REQUESTSxINPUTxOUTPUT, such as 64x128x256")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.input_tokens}x{self.output_tokens}"

    def draw_trace(self, num_adapters: int) -> tuple[TraceRequest, ...]:
        """Nothing is drawn: request number i has adapter number i, counted round."""
        adapters = [i % num_adapters if num_adapters else None for i in range(self.num_requests)]
        return tuple(TraceRequest(0.0, adapter, self.input_tokens, self.output_tokens) for adapter in adapters)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the runs have in common."""

    alpha: float = 1.0
    duration_s: float = 300.0
    num_saturated: int = SATURATED_REQUESTS
    seed: int = SEED
    lengths: tuple[int, int] = LENGTHS


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One run. num_adapters: 0 for the base model. rate: None sends everything at once, as drawn or of a fixed length."""

    num_adapters: int
    rate: Rate | None = None
    cv: float = 1.0
    trace: Path | None = None
    fixed: FixedLoad | None = None

    @property
    def kind(self) -> str:
        """What sort of run it is."""
        if self.trace is not None:
            return "trace"
        if self.fixed is not None:
            return "fixed"
        return "saturated" if self.rate is None else "open_loop"


def plan_runs(
    num_adapters: Sequence[int],
    rates: Sequence[Rate] = (),
    cvs: Sequence[float] = (1.0,),
    fixed: Sequence[tuple[FixedLoad, int]] = (),
    *,
    base_only: bool,
    saturated: bool,
    repeat: int = 1,
) -> Iterator[RunPlan]:
    """Saturated runs first, since rates may be shares of what they reach; each kind with the base model first.

    fixed: with the number of adapters of each. repeat: how often everything is done that has no rate, in turn: what takes a
    minute may drift from the first to the last.
    """
    every = ([0] if base_only else []) + list(num_adapters)
    for _ in range(repeat):
        if saturated:
            yield from (RunPlan(n) for n in every)
        yield from (RunPlan(n, fixed=load) for load, n in fixed)
    for rate in rates:
        for cv in cvs:
            yield from (RunPlan(n, rate, cv) for n in every)


def draw_trace(plan: RunPlan, workload: Workload, rate: float | None) -> tuple[TraceRequest, ...]:
    """The requests of a run. rate: a second, now that shares are known."""
    if plan.trace is not None:
        return read_trace(plan.trace)
    if plan.fixed is not None:
        return plan.fixed.draw_trace(plan.num_adapters)
    popularity = Popularity(plan.num_adapters, workload.alpha)
    if rate is None:
        return saturated_trace(popularity, num_requests=workload.num_saturated, seed=workload.seed, lengths=workload.lengths)
    return open_loop_trace(
        popularity, rate=rate, duration_s=workload.duration_s, cv=plan.cv, seed=workload.seed, lengths=workload.lengths
    )
