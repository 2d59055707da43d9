"""Workloads are what their closed forms say, and the same for the same seed."""

import numpy as np
import pytest

from adapter_store.geometry import LORA_MODULES
from benchmarks.serving.trace import TraceRequest
from benchmarks.workload import (
    LENGTHS,
    SETTINGS,
    Popularity,
    open_loop_trace,
    saturated_trace,
)


def adapters_of(trace: tuple[TraceRequest, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([request.adapter for request in trace])


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for(cv: float) -> None:
    trace = open_loop_trace(Popularity(10), rate=20, duration_s=5000, cv=cv)
    gaps = np.diff([0.0, *(request.at_s for request in trace)])
    assert len(trace) == 100_000
    # The mean of N gaps has a standard error of cv / sqrt(N), their variation one that grows with cv; four of each.
    assert gaps.mean() == pytest.approx(1 / 20, rel=4 * cv / 100_000**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)
    assert (gaps >= 0).all()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("num_adapters", [5, 100])
def test_the_first_adapter_gets_its_share(alpha: float, num_adapters: int) -> None:
    adapters = adapters_of(saturated_trace(Popularity(num_adapters, alpha), num_requests=40_000))
    # P(floor(n X) <= k) = ((k + 1) / n)^alpha.
    for rank in (0, 1, num_adapters // 2):
        expected = ((rank + 1) / num_adapters) ** alpha
        assert (adapters <= rank).mean() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 40_000) ** 0.5 + 1e-9)
    assert adapters.min() >= 0 and adapters.max() < num_adapters


def test_lengths_are_uniform_within_their_bounds() -> None:
    assert LENGTHS == (8, 512)
    for low, high in (LENGTHS, (3, 20)):
        trace = saturated_trace(Popularity(7), num_requests=50_000, lengths=(low, high))
        for lengths in ([r.input_tokens for r in trace], [r.output_tokens for r in trace]):
            assert (min(lengths), max(lengths)) == (low, high - 1)
            assert np.mean(lengths) == pytest.approx((low + high - 1) / 2, rel=0.01)


def test_the_saturated_trace_is_the_one_that_peers_were_measured_with() -> None:
    draw = np.random.RandomState(42)
    adapters = np.floor(1000 * draw.power(1, 400)).astype(int).tolist()
    inputs = draw.randint(8, 512, 400).tolist()
    outputs = draw.randint(8, 512, 400).tolist()
    expected = [TraceRequest(0.0, *row) for row in zip(adapters, inputs, outputs, strict=True)]
    assert list(saturated_trace(Popularity(1000))) == expected


def test_the_draws_follow_one_another_as_in_the_reference() -> None:
    trace = open_loop_trace(Popularity(100, 0.5), rate=4, duration_s=10, cv=2, seed=7)
    draw = np.random.RandomState(7)
    assert adapters_of(trace).tolist() == (100 * draw.power(0.5, 40)).astype(int).tolist()
    assert [r.input_tokens for r in trace] == draw.randint(8, 512, 40).tolist()
    assert [r.output_tokens for r in trace] == draw.randint(8, 512, 40).tolist()
    assert [r.at_s for r in trace] == pytest.approx(np.cumsum([draw.gamma(0.25, 1.0) for _ in range(40)]).tolist())


def test_without_adapters_the_base_gets_the_same_lengths_at_the_same_times() -> None:
    base, adapted = (open_loop_trace(Popularity(n), rate=5, duration_s=20, cv=3) for n in (0, 50))
    assert {request.adapter for request in base} == {None}
    rest = [(r.at_s, r.input_tokens, r.output_tokens) for r in base]
    assert rest == [(r.at_s, r.input_tokens, r.output_tokens) for r in adapted]


def test_the_seed_decides_everything() -> None:
    first, again, other = (open_loop_trace(Popularity(9), rate=10, duration_s=10, seed=seed) for seed in (42, 42, 43))
    assert first == again != other


def test_what_cannot_be_drawn_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"num_adapters is -1; it must be 0"):
        Popularity(-1)
    with pytest.raises(ValueError, match=r"alpha is 0; it must be above 0"):
        Popularity(3, 0)
    with pytest.raises(ValueError, match=r"rate is -2; it must be above 0"):
        open_loop_trace(Popularity(3), rate=-2, duration_s=10)
    with pytest.raises(ValueError, match=r"0.1 requests/s for 5 s are no request"):
        open_loop_trace(Popularity(3), rate=0.1, duration_s=5)
    with pytest.raises(ValueError, match=r"num_requests is 0"):
        saturated_trace(Popularity(3), num_requests=0)
    with pytest.raises(ValueError, match=r"lengths are from 9 to below 9"):
        saturated_trace(Popularity(3), lengths=(9, 9))


def test_settings_are_those_of_the_paper_and_one_of_today() -> None:
    published = {name: (s.shape.hidden_size, s.shape.num_layers, s.ranks) for name, s in SETTINGS.items() if name.startswith("S")}
    assert published == {
        "S1": (4096, 32, (8,)),
        "S2": (4096, 32, (64, 32, 16, 8)),
        "S4": (5120, 40, (64, 32, 16)),
        "S5": (7168, 48, (32,)),
        "S6": (8192, 80, (64,)),
    }
    assert SETTINGS["M1"].modules == LORA_MODULES and SETTINGS["M1"].shape.num_kv_heads == 8
