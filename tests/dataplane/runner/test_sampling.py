"""What is chosen from given logits: distributions, penalties, masks, and that a row never depends on its neighbours."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.runner.sampling import SamplingRow, sample, uniforms
from protos.planes import EngineSampling

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def _row(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **sampling: Any) -> SamplingRow:
    params = EngineSampling(**{"max_tokens": 100, **sampling})
    return SamplingRow(params, (*prompt, *output), len(prompt))


def _choose(logits: Sequence[float], row: SamplingRow, eos: Sequence[int] = ()) -> int | None:
    (sampled,) = sample(torch.tensor([logits]), [row], eos)
    return sampled.token_id


def _counts(num_draws: int, **sampling: Any) -> list[int]:
    """How often each token is drawn at as many different positions."""
    rows = [_row(prompt=[0] * (1 + i), temperature=1.0, seed=99, **sampling) for i in range(num_draws)]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * num_draws), rows, ())]
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


def test_draws_follow_the_softmax() -> None:
    assert _chi_square(_counts(2000), _softmax(LOGITS)) < CHI_SQUARE_LIMIT


def test_temperature_flattens() -> None:
    rows = [_row(prompt=[0] * (1 + i), temperature=3.0, seed=5) for i in range(2000)]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * 2000), rows, ())]
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
def test_truncation_keeps_the_most_likely_in_proportion(sampling: dict[str, float], num_kept: int) -> None:
    probs = _softmax(LOGITS)[:num_kept]
    expected = [p / sum(probs) for p in probs] + [0.0] * (len(LOGITS) - num_kept)
    assert _chi_square(_counts(1000, **sampling), expected) < CHI_SQUARE_LIMIT


def test_top_k_of_equals_keeps_the_lowest_ids() -> None:
    tokens = {_choose([1.0] * 8, _row(prompt=[0] * i, temperature=1.0, top_k=3)) for i in range(1, 60)}
    assert tokens == {0, 1, 2}


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    assert _choose([0.0, 3.0, 1.0, 3.0, 3.0], _row()) == 1


def test_of_equal_logprobs_the_lowest_ids_are_told() -> None:
    rows = [_row(num_logprobs=n) for n in (2, None, 3)]
    first, without, second = sample(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]] * 3), rows, ())
    assert first.logprobs is not None and first.logprobs.top_token_ids == (1, 2)
    assert without.logprobs is None
    assert second.logprobs is not None and second.logprobs.top_token_ids == (1, 2, 3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert _choose([0.0, 1.0, 5.0, 4.9], _row(temperature=temperature)) == 2


def test_repetition_penalty_covers_prompt_and_output() -> None:
    logits = [4.0, 3.9, 3.8, -0.1, -0.2]
    assert _choose(logits, _row(prompt=[0], output=[1], repetition_penalty=1.5)) == 2
    # Negative logits grow more negative: dividing them would reward the repetition.
    assert _choose([-0.1, -0.15], _row(prompt=[0], repetition_penalty=2.0)) == 1


@pytest.mark.parametrize(("penalty", "token_id"), [(1e-45, 0), (1e38, 1)])
def test_the_strongest_repetition_penalty_still_gives_a_token(penalty: float, token_id: int) -> None:
    assert _choose([4.0, 3.0, -9.0], _row(prompt=[0], output=[2], repetition_penalty=penalty)) == token_id


def test_presence_and_frequency_penalties_cover_the_output_alone() -> None:
    assert _choose([2.0, 1.0, 0.0], _row(prompt=[0, 0], presence_penalty=2.0, frequency_penalty=2.0)) == 0
    assert _choose([2.0, 1.0, 0.0], _row(output=[0], presence_penalty=1.5)) == 1
    assert _choose([2.0, 1.0, 0.0], _row(output=[0, 0], presence_penalty=0.6)) == 0
    assert _choose([2.0, 1.0, 0.0], _row(output=[0, 0], frequency_penalty=0.6)) == 1


def test_nothing_that_ends_a_request_comes_before_min_tokens() -> None:
    early = _row(output=[3], min_tokens=2, stop_token_ids=(1, 900))
    assert _choose([9.0, 8.0, 7.0], early, eos=[0]) == 2
    late = _row(output=[3, 3], min_tokens=2, stop_token_ids=(1,))
    assert _choose([9.0, 8.0, 7.0], late, eos=[0]) == 0
    assert _choose([9.0, 8.0, 7.0], _row(min_tokens=2, ignore_eos=True), eos=[0]) == 0, "with ignore_eos, EOS ends nothing"


def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf], [1.0, 0.0]])
    rows = [_row(), _row(temperature=1.0, num_logprobs=1), _row(temperature=1.0), _row(temperature=1.0), _row()]
    sampled = sample(logits, rows, ())
    assert [s.token_id for s in sampled] == [1, None, None, None, 0]
    assert sampled[1].logprobs is None


def test_logprobs_are_of_the_raw_logits() -> None:
    row = _row(output=[0], temperature=7.0, top_k=1, presence_penalty=2.0, min_tokens=5, num_logprobs=3)
    (sampled,) = sample(torch.tensor([LOGITS]), [row], [1])
    expected = torch.tensor(LOGITS).log_softmax(0)
    assert sampled.token_id is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == (0, 1, 2)
    assert sampled.logprobs.top_logprobs == pytest.approx(expected[:3].tolist())
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token_id].item())


def test_zero_alternatives_give_the_chosen_tokens_logprob_alone() -> None:
    (sampled,) = sample(torch.tensor([LOGITS]), [_row(num_logprobs=0)], ())
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == ()
    assert sampled.logprobs.logprob == pytest.approx(math.log(_softmax(LOGITS)[0]))


def test_extreme_parameters_stay_within_the_distribution() -> None:
    rows = [
        _row(temperature=1.0, top_k=2**32 - 1),
        _row(temperature=1.0, top_p=1e-45),
        _row(temperature=100.0, min_p=1.0),
        _row(temperature=1e-45, top_k=1, top_p=1e-45, min_p=1.0, seed=2**64 - 1),
    ]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * len(rows)), rows, ())]
    assert tokens[0] in range(len(LOGITS))
    assert tokens[1:] == [0, 0, 0]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 5), [], ()) == ()


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
        counts = torch.histc(u.float(), bins=16, min=0, max=1).tolist()
        # 99.9 % quantile with 15 degrees of freedom.
        assert sum((c - 250) ** 2 / 250 for c in counts) < 37.7


_rows = st.builds(
    _row,
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 11), max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([0.2, 0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (2, 3)]),
    num_logprobs=st.sampled_from([None, 0, 2]),
)


@given(rows=st.lists(_rows, min_size=1, max_size=6), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_gives_the_same_token_alone_and_in_any_batch(rows: list[SamplingRow], seed: int, data: st.DataObject) -> None:
    logits = torch.randn(len(rows), 12, generator=torch.Generator().manual_seed(seed)) * 3
    alone = [sample(logits[i : i + 1].clone(), [row], [5])[0] for i, row in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    together = sample(logits[order].clone(), [rows[i] for i in order], [5])
    assert list(together) == [alone[i] for i in order]
