"""What is drawn from given logits: how often each token, which are cut off, and by which random numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dataplane.runner.drawing import uniforms
from tests.dataplane.runner.sampled import LOGITS, choose, make_row, sample


def _counts(device: torch.device, num_draws: int, **sampling: Any) -> list[int]:
    """How often each token is drawn at as many different positions."""
    rows = [make_row(prompt=[0] * (1 + i), temperature=1.0, seed=99, **sampling) for i in range(num_draws)]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * num_draws), rows, device)]
    return [tokens.count(i) for i in range(len(LOGITS))]


def _softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def _chi_square(counts: Sequence[int], probs: Sequence[float]) -> float:
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, probs, strict=True) if p == 0), "a token that was cut off was drawn"
    return sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, probs, strict=True) if p)


# 99.9 % quantile of chi square with 5 degrees of freedom; the seeds are fixed, so the tests are not left to chance.
CHI_SQUARE_LIMIT = 20.5


def test_draws_follow_the_softmax(device: torch.device) -> None:
    assert _chi_square(_counts(device, 2000), _softmax(LOGITS)) < CHI_SQUARE_LIMIT


def test_temperature_flattens(device: torch.device) -> None:
    rows = [make_row(prompt=[0] * (1 + i), temperature=3.0, seed=5) for i in range(2000)]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * 2000), rows, device)]
    counts = [tokens.count(i) for i in range(len(LOGITS))]
    assert _chi_square(counts, _softmax([x / 3 for x in LOGITS])) < CHI_SQUARE_LIMIT


@pytest.mark.parametrize(
    ("sampling", "num_kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 100}, 6),
        # Shares are 0.55, 0.20, 0.12, 0.075, 0.027, 0.004.
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.9}, 4),
        ({"top_p": 1.0}, 6),
        ({"min_p": 0.3}, 2),
        ({"min_p": 1.0}, 1),
        # Of the two that top_k leaves, the first has 0.73.
        ({"top_k": 2, "top_p": 0.7}, 1),
        ({"top_k": 3, "min_p": 0.3}, 2),
    ],
)
def test_truncation_keeps_the_most_likely_in_proportion(device: torch.device, sampling: dict[str, float], num_kept: int) -> None:
    probs = _softmax(LOGITS)[:num_kept]
    expected = [p / sum(probs) for p in probs] + [0.0] * (len(LOGITS) - num_kept)
    assert _chi_square(_counts(device, 1000, **sampling), expected) < CHI_SQUARE_LIMIT


def test_top_k_of_equals_keeps_the_lowest_ids(device: torch.device) -> None:
    tokens = {choose(device, [1.0] * 8, make_row(prompt=[0] * i, temperature=1.0, top_k=3)) for i in range(1, 60)}
    assert tokens == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(device: torch.device, temperature: float) -> None:
    assert choose(device, [0.0, 1.0, 5.0, 4.9], make_row(temperature=temperature)) == 2


def test_extreme_parameters_stay_within_the_distribution(device: torch.device) -> None:
    rows = [
        make_row(temperature=1.0, top_k=2**32 - 1),
        make_row(temperature=1.0, top_p=1e-45),
        make_row(temperature=100.0, min_p=1.0),
        make_row(temperature=1e-45, top_k=1, top_p=1e-45, min_p=1.0, seed=2**64 - 1),
    ]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * len(rows)), rows, device)]
    assert tokens[0] in range(len(LOGITS))
    assert tokens[1:] == [0, 0, 0]


def test_uniforms_are_splitmix64_of_seed_and_position() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    pairs = [(0, 0), (1, 0), (0, 1), (2**64 - 1, 7), (2**63, 2**31), (12345, 678)]
    expected = [(mix((mix((s + golden) % 2**64) + (p + 1) * golden) % 2**64) >> 16) / 2**48 for s, p in pairs]
    assert uniforms([s for s, _ in pairs], [p for _, p in pairs]).tolist() == expected


def test_uniforms_fill_the_interval_evenly_over_positions_and_over_seeds() -> None:
    for u in (uniforms([3] * 4000, range(4000)), uniforms(range(4000), [17] * 4000)):
        counts = np.histogram(u, bins=16, range=(0, 1))[0]
        # 99.9 % quantile with 15 degrees of freedom.
        assert sum((c - 250) ** 2 / 250 for c in counts) < 37.7
