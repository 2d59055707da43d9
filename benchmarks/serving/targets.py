"""The part of the report that judges: what the service is held against end to end, and what vLLM reached under the same loads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.markdown import cell, table
from benchmarks.serving.records import OURS, Json, runs_of, who
from benchmarks.workload import LENGTHS, SATURATED_REQUESTS

HEAD = """Ours through the API beside vLLM 0.24.0 in its own process (`LLM.generate`, CUDA graphs, 32 adapter slots, 256
sequences) on the same kind of GPU under the same loads, and what ours is held against. vLLM's figures were measured once,
elsewhere and without the API in between: no result file holds them. A fixed load of 64x128x256 is 64 requests at once, each of
128 tokens in and 256 out, adapters dealt in turn:
"""

LIMITS_HEAD = """Ratios of two runs of ours, one after the other in one start, and what they are held against:
"""


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the table: a saturated run, or one of a fixed load. vllm: in the same figure."""

    setting: str
    num_adapters: int
    fixed: str | None
    vllm: float
    target: float | None

    @property
    def figure(self) -> str:
        """What is compared: all requests of a fixed load are alike, so tokens tell more."""
        return "output_tokens_per_s" if self.fixed else "requests_per_s"

    @property
    def what(self) -> str:
        """The load in words."""
        load = f"fixed load {self.fixed}, tokens/s" if self.fixed else "saturated, requests/s"
        return f"{self.setting}, {who(self.num_adapters)}: {load}"


TARGETS = (
    Target("S1", 0, "64x128x256", 7770, 10_000),
    Target("S1", 0, "32x128x256", 4980, None),
    Target("S1", 32, "32x128x256", 1430, 5500),
    Target("S2", 8, "64x128x256", 3590, 8500),
    Target("S1", 0, None, 29.7, 33),
    Target("S1", 5, None, 17.1, None),
    Target("S1", 100, None, 9.2, None),
    Target("S1", 1000, None, 4.3, 30),
    Target("S2", 100, None, 7.1, None),
    Target("S2", 400, None, 4.0, 26),
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A ratio of two figures of ours in one setting. figure: in words. measure: None where it was not measured."""

    setting: str
    num_adapters: int
    figure: str
    limit: float
    is_least: bool
    measure: Callable[[Json], float | None]

    @property
    def what(self) -> str:
        """The ratio in words."""
        return f"{self.setting}, {who(self.num_adapters)}: {self.figure}"

    def holds(self, value: float) -> bool:
        """Whether a value is within it."""
        return value >= self.limit if self.is_least else value <= self.limit


def _saturated_ratio(num_adapters: int, other: int) -> Callable[[Json], float | None]:
    """Where several results have both, the least."""

    def measure(result: Json) -> float | None:
        rates: dict[str, dict[int, float]] = {}
        for run in filter(_is_full, runs_of(result, "saturated")):
            rates.setdefault(run["result"], {})[run["num_adapters"]] = run["requests_per_s"]
        return min(_ratios(rates.values(), num_adapters, other), default=None)

    return measure


def _ttft_ratio(num_adapters: int, other: int) -> Callable[[Json], float | None]:
    """At the rate at which it is the largest."""

    def measure(result: Json) -> float | None:
        ttft: dict[tuple[str, float, float], dict[int, float]] = {}
        for run in runs_of(result, "open_loop"):
            if run["ttft_s"]:
                ttft.setdefault((run["result"], run["rate"], run["cv"]), {})[run["num_adapters"]] = run["ttft_s"]["p50"]
        return max(_ratios(ttft.values(), num_adapters, other), default=None)

    return measure


def _ratios(figures: Iterable[Mapping[int, float]], num_adapters: int, other: int) -> list[float]:
    """figures: by number of adapters, of runs that may be compared."""
    return [of[num_adapters] / of[other] for of in figures if num_adapters in of and of.get(other)]


LIMITS = (
    Limit("S1", 1000, "saturated throughput, of the base model's", 0.9, True, _saturated_ratio(1000, 0)),
    Limit("S1", 2000, "saturated throughput, of that with 1,000", 0.97, True, _saturated_ratio(2000, 1000)),
    Limit(
        "S1",
        1000,
        "median time to first token, over that with 5 at the same rate, at the worst of all rates",
        1.3,
        False,
        _ttft_ratio(1000, 5),
    ),
)


def targets_section(settings: Mapping[str, Sequence[Json]]) -> list[str]:
    """Those that results decide; nothing where none do."""
    rows = [
        [
            target.what,
            f"{target.vllm:,}",
            f"{value:,.0f}" if target.fixed else f"{value:.1f}",
            f"{value / target.vllm:.1f}",
            cell(target.target, ",d") + ("; missed" if target.target is not None and value < target.target else ""),
        ]
        for target in TARGETS
        if (value := _reached(target, settings)) is not None
    ]
    limits = [
        f"- {limit.what}: {value:.3f} ({'at least' if limit.is_least else 'at most'} {limit.limit:g}"
        f"{'' if limit.holds(value) else '; missed'})"
        for limit in LIMITS
        for result in _ours(limit.setting, settings)
        if (value := limit.measure(result)) is not None
    ]
    return [
        *([HEAD, *table(["", "vLLM", "ours", "times vLLM", "at least"], rows), ""] if rows else []),
        *([LIMITS_HEAD, *limits, ""] if limits else []),
    ]


def _reached(target: Target, settings: Mapping[str, Sequence[Json]]) -> float | None:
    """What ours did under that load, if that was measured."""
    for result in _ours(target.setting, settings):
        for run in runs_of(result, "fixed" if target.fixed else "saturated"):
            is_same = run.get("fixed") == target.fixed if target.fixed else _is_full(run)
            if run["num_adapters"] == target.num_adapters and is_same:
                figure: float = run[target.figure]
                return figure
    return None


def _ours(setting: str, settings: Mapping[str, Sequence[Json]]) -> list[Json]:
    return [result for result in settings.get(setting, ()) if result["system"] == OURS]


def _is_full(run: Json) -> bool:
    """Whether a saturated run is of the trace that the targets are for."""
    return bool(run["num_requests"] == SATURATED_REQUESTS and tuple(run["lengths"]) == LENGTHS and run["alpha"] == 1)
