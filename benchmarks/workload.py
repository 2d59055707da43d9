"""The workloads of the S-LoRA paper's evaluation: settings, arrivals, popularity of adapters, lengths; all drawn from one seed.

`python -m benchmarks.workload --adapters 1000 --rate 10 --duration 120 > trace.jsonl` writes one as a trace. Knows nothing of
how a trace is replayed.
"""

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapter_store.geometry import LORA_MODULES
from benchmarks.model_shapes import ATTENTION_MODULES, LLAMA_3_8B, LLAMA_7B, LLAMA_13B, LLAMA_30B, LLAMA_70B, TINY, ModelShape
from benchmarks.serving.trace import TraceRequest, to_line

# Prompts and outputs have lengths uniform on [8, 512), each.
LENGTHS = (8, 512)
SEED = 42
SATURATED_REQUESTS = 400


@dataclass(frozen=True, slots=True)
class Setting:
    """A base model and the ranks of its adapters, in turn: adapter number i has ranks[i % len(ranks)]."""

    name: str
    shape: ModelShape
    ranks: tuple[int, ...]
    modules: tuple[str, ...] = ATTENTION_MODULES


# S3 has no results in the paper. Not of the paper are M1, a base of today with every linear layer adapted, and tiny, which tries
# a benchmark on a CPU.
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("S1", LLAMA_7B, (8,)),
        Setting("S2", LLAMA_7B, (64, 32, 16, 8)),
        Setting("S4", LLAMA_13B, (64, 32, 16)),
        Setting("S5", LLAMA_30B, (32,)),
        Setting("S6", LLAMA_70B, (64,)),
        Setting("M1", LLAMA_3_8B, (8, 16, 32, 64), LORA_MODULES),
        Setting("tiny", TINY, (4, 8), LORA_MODULES),
    )
}


@dataclass(frozen=True, slots=True)
class Popularity:
    """How requests spread over `num_adapters`: number floor(n·X), X with density alpha·x^(alpha-1) on [0, 1).

    alpha 1 is uniform; the smaller alpha, the more go to the first adapters, n^-alpha of them to the very first. With
    num_adapters 0 all go to the base model.
    """

    num_adapters: int
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.num_adapters < 0:
            raise ValueError(f"num_adapters is {self.num_adapters}; it must be 0 (base model only) or more")
        _check_positive("alpha", self.alpha)


def open_loop_trace(
    popularity: Popularity,
    *,
    rate: float,
    duration_s: float,
    cv: float = 1.0,
    seed: int = SEED,
    lengths: tuple[int, int] = LENGTHS,
) -> tuple[TraceRequest, ...]:
    """int(rate·duration_s) arrivals of a Gamma renewal process: `rate` a second, coefficient of variation `cv` (1 is Poisson).

    Drawn in the order of the reference: adapters, input lengths, output lengths, times between arrivals. So the same seed gives
    the same requests whatever the cv, and the same lengths whatever the number of adapters.
    """
    for name, value in (("rate", rate), ("duration_s", duration_s), ("cv", cv)):
        _check_positive(name, value)
    num_requests = int(rate * duration_s)
    if num_requests < 1:
        raise ValueError(f"{rate:g} requests/s for {duration_s:g} s are no request at all")
    draw = np.random.RandomState(seed)
    requests = _draw_requests(draw, popularity, num_requests, lengths)
    arrivals = np.cumsum(draw.gamma(1 / cv**2, cv**2 / rate, num_requests))
    return _trace(requests, arrivals)


def saturated_trace(
    popularity: Popularity,
    *,
    num_requests: int = SATURATED_REQUESTS,
    seed: int = SEED,
    lengths: tuple[int, int] = LENGTHS,
) -> tuple[TraceRequest, ...]:
    """All requests at once: measures what a service can do, where an open loop may measure its own rate."""
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}; it must be 1 or more")
    requests = _draw_requests(np.random.RandomState(seed), popularity, num_requests, lengths)
    return _trace(requests, np.zeros(num_requests))


@dataclass(frozen=True, slots=True)
class _Requests:
    """Three arrays, one entry per request. adapters: -1 for the base model."""

    adapters: npt.NDArray[np.int64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]


def _draw_requests(draw: np.random.RandomState, popularity: Popularity, num_requests: int, lengths: tuple[int, int]) -> _Requests:
    if not 1 <= lengths[0] < lengths[1]:
        raise ValueError(f"lengths are from {lengths[0]} to below {lengths[1]}; that must be 1 or more, and not empty")
    # Drawn without adapters too, so that the base model gets the lengths that the adapters get.
    x = draw.power(popularity.alpha, num_requests)
    # Rounding may make an X of exactly 1.
    adapters = np.minimum((popularity.num_adapters * x).astype(np.int64), popularity.num_adapters - 1)
    input_tokens = draw.randint(*lengths, num_requests)
    return _Requests(adapters, input_tokens, draw.randint(*lengths, num_requests))


def _trace(requests: _Requests, arrivals: npt.NDArray[np.float64]) -> tuple[TraceRequest, ...]:
    columns = (arrivals, requests.adapters, requests.input_tokens, requests.output_tokens)
    return tuple(
        TraceRequest(at_s, None if adapter < 0 else adapter, input_tokens, output_tokens)
        for at_s, adapter, input_tokens, output_tokens in zip(*(column.tolist() for column in columns), strict=True)
    )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value:g}; it must be above 0")


def main() -> int:
    """Writes one trace to the standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload", description="One workload as a trace (JSON lines).")
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="0: base model only (default)")
    parser.add_argument("--alpha", type=float, default=1.0, help="1 is uniform popularity (default)")
    parser.add_argument("--rate", type=float, metavar="PER_S", help="without it all requests come at once")
    parser.add_argument("--duration", type=float, default=300.0, metavar="SECONDS", help="(300)")
    parser.add_argument("--cv", type=float, default=1.0, help="1 is Poisson (default); larger is burstier")
    parser.add_argument("--requests", type=int, default=SATURATED_REQUESTS, metavar="N", help="when all come at once (400)")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    try:
        popularity = Popularity(args.adapters, args.alpha)
        if args.rate is None:
            trace = saturated_trace(popularity, num_requests=args.requests, seed=args.seed)
        else:
            trace = open_loop_trace(popularity, rate=args.rate, duration_s=args.duration, cv=args.cv, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.writelines(to_line(request) + "\n" for request in trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
