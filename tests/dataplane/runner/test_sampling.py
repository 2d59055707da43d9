"""What is chosen from given logits: distributions, penalties, masks, that a row never depends on its neighbours, nor on whether
the host knew its last token."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dataplane.runner.drawing import uniforms
from dataplane.runner.sampling import SampledToken, Sampler, SamplingRow
from protos.planes import EngineSampling, StepLogprobs

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def _row(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **sampling: Any) -> SamplingRow:
    params = EngineSampling(**{"max_tokens": 100, **sampling})
    return SamplingRow(params, np.array([*prompt, *output], dtype=np.int32), len(prompt))


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow], device: torch.device, eos: Sequence[int] = ()
) -> tuple[SampledToken, ...]:
    """What a sampler of its own chooses."""
    sampler = Sampler(logits.shape[1], eos, max(1, len(rows)), device)
    return sampler.launch(logits.clone().to(device), rows).wait()


def _choose(device: torch.device, logits: Sequence[float], row: SamplingRow, eos: Sequence[int] = ()) -> int | None:
    (sampled,) = sample(torch.tensor([logits]), [row], device, eos)
    return sampled.token_id


def _counts(device: torch.device, num_draws: int, **sampling: Any) -> list[int]:
    """How often each token is drawn at as many different positions."""
    rows = [_row(prompt=[0] * (1 + i), temperature=1.0, seed=99, **sampling) for i in range(num_draws)]
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
    rows = [_row(prompt=[0] * (1 + i), temperature=3.0, seed=5) for i in range(2000)]
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
    tokens = {_choose(device, [1.0] * 8, _row(prompt=[0] * i, temperature=1.0, top_k=3)) for i in range(1, 60)}
    assert tokens == {0, 1, 2}


def test_greedy_takes_the_lowest_of_equal_maxima(device: torch.device) -> None:
    assert _choose(device, [0.0, 3.0, 1.0, 3.0, 3.0], _row()) == 1


def test_of_equal_logprobs_the_lowest_ids_are_told(device: torch.device) -> None:
    rows = [_row(num_logprobs=n) for n in (2, None, 3)]
    first, without, second = sample(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]] * 3), rows, device)
    assert first.logprobs is not None and first.logprobs.top_token_ids == (1, 2)
    assert without.logprobs is None
    assert second.logprobs is not None and second.logprobs.top_token_ids == (1, 2, 3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(device: torch.device, temperature: float) -> None:
    assert _choose(device, [0.0, 1.0, 5.0, 4.9], _row(temperature=temperature)) == 2


def test_repetition_penalty_covers_prompt_and_output(device: torch.device) -> None:
    logits = [4.0, 3.9, 3.8, -0.1, -0.2]
    assert _choose(device, logits, _row(prompt=[0], output=[1], repetition_penalty=1.5)) == 2
    # Negative logits grow more negative: dividing them would reward the repetition.
    assert _choose(device, [-0.1, -0.15], _row(prompt=[0], repetition_penalty=2.0)) == 1


@pytest.mark.parametrize(("penalty", "token_id"), [(1e-45, 0), (1e38, 1)])
def test_the_strongest_repetition_penalty_still_gives_a_token(device: torch.device, penalty: float, token_id: int) -> None:
    assert _choose(device, [4.0, 3.0, -9.0], _row(prompt=[0], output=[2], repetition_penalty=penalty)) == token_id


def test_presence_and_frequency_penalties_cover_the_output_alone(device: torch.device) -> None:
    assert _choose(device, [2.0, 1.0, 0.0], _row(prompt=[0, 0], presence_penalty=2.0, frequency_penalty=2.0)) == 0
    assert _choose(device, [2.0, 1.0, 0.0], _row(output=[0], presence_penalty=1.5)) == 1
    assert _choose(device, [2.0, 1.0, 0.0], _row(output=[0, 0], presence_penalty=0.6)) == 0
    assert _choose(device, [2.0, 1.0, 0.0], _row(output=[0, 0], frequency_penalty=0.6)) == 1


def test_nothing_that_ends_a_request_comes_before_min_tokens(device: torch.device) -> None:
    early = _row(output=[3], min_tokens=2, stop_token_ids=(1, 900))
    assert _choose(device, [9.0, 8.0, 7.0], early, eos=[0]) == 2
    late = _row(output=[3, 3], min_tokens=2, stop_token_ids=(1,))
    assert _choose(device, [9.0, 8.0, 7.0], late, eos=[0]) == 0
    assert _choose(device, [9.0, 8.0, 7.0], _row(min_tokens=2, ignore_eos=True), eos=[0]) == 0, (
        "with ignore_eos, EOS ends nothing"
    )


def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf], [1.0, 0.0]])
    rows = [_row(), _row(temperature=1.0, num_logprobs=1), _row(temperature=1.0), _row(temperature=1.0), _row()]
    sampled = sample(logits, rows, device)
    assert [s.token_id for s in sampled] == [1, None, None, None, 0]
    assert sampled[1].logprobs is None


def test_logprobs_are_of_the_raw_logits(device: torch.device) -> None:
    row = _row(output=[0], temperature=7.0, top_k=1, presence_penalty=2.0, min_tokens=5, num_logprobs=3)
    (sampled,) = sample(torch.tensor([LOGITS]), [row], device, [1])
    expected = torch.tensor(LOGITS).log_softmax(0)
    assert sampled.token_id is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == (0, 1, 2)
    assert sampled.logprobs.top_logprobs == pytest.approx(expected[:3].tolist())
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token_id].item())


def test_zero_alternatives_give_the_chosen_tokens_logprob_alone(device: torch.device) -> None:
    (sampled,) = sample(torch.tensor([LOGITS]), [_row(num_logprobs=0)], device)
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == ()
    assert sampled.logprobs.logprob == pytest.approx(math.log(_softmax(LOGITS)[0]))


def test_extreme_parameters_stay_within_the_distribution(device: torch.device) -> None:
    rows = [
        _row(temperature=1.0, top_k=2**32 - 1),
        _row(temperature=1.0, top_p=1e-45),
        _row(temperature=100.0, min_p=1.0),
        _row(temperature=1e-45, top_k=1, top_p=1e-45, min_p=1.0, seed=2**64 - 1),
    ]
    tokens = [s.token_id for s in sample(torch.tensor([LOGITS] * len(rows)), rows, device)]
    assert tokens[0] in range(len(LOGITS))
    assert tokens[1:] == [0, 0, 0]


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    assert sample(torch.empty(0, 5), [], device) == ()


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


VOCAB = 12
EOS = 5
# Coarse, so that many are equal and the rest are far apart.
_logits = st.lists(st.sampled_from([-math.inf, -2.5, -1.0, 0.0, 0.5, 0.75, 3.0]), min_size=VOCAB, max_size=VOCAB).filter(
    lambda row: max(row) > -math.inf
)
_token_ids = st.integers(0, VOCAB - 1)
_rows = st.builds(
    _row,
    prompt=st.lists(_token_ids, min_size=1, max_size=6),
    output=st.lists(_token_ids, max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4]),
    # No share of a few equal tokens.
    top_p=st.sampled_from([0.17, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (2, 3)]),
    ignore_eos=st.booleans(),
    num_logprobs=st.sampled_from([None, 0, 2]),
)
_batches = st.lists(st.tuples(_logits, _rows), min_size=1, max_size=6)


def _one_by_one(logits: Sequence[float], row: SamplingRow) -> SampledToken:
    """The same choice, the plain way: one row, in numpy."""
    sampling, values = row.sampling, np.array(logits, dtype=np.float32)
    output = row.token_ids[row.num_prompt_tokens :]
    for token_id in set(row.token_ids.tolist()):
        penalty = np.float32(sampling.repetition_penalty)
        penalized = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
        if penalty != 1:
            values[token_id] = np.clip(penalized, -np.finfo(np.float32).max, np.finfo(np.float32).max)
    for token_id in set(output.tolist()):
        times = np.float32(np.count_nonzero(output == token_id))
        values[token_id] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    if len(output) < sampling.min_tokens:
        values[[*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))]] = -math.inf
    if values.max() == -math.inf:
        return SampledToken(None)
    token_id = _draw_one(values.astype(np.float64), row) if sampling.temperature else int(values.argmax())
    if sampling.num_logprobs is None:
        return SampledToken(token_id)
    raw = np.array(logits)
    logprobs = raw - math.log(np.exp(raw).sum())
    top = np.argsort(-raw, kind="stable")[: sampling.num_logprobs]
    return SampledToken(token_id, StepLogprobs(logprobs[token_id], tuple(top.tolist()), tuple(logprobs[top].tolist())))


def _draw_one(values: NDArray[np.float64], row: SamplingRow) -> int:
    sampling = row.sampling
    probs = np.exp((values - values.max()) / sampling.temperature)
    kept = np.argsort(-probs, kind="stable")[: sampling.top_k or VOCAB]
    if sampling.top_p < 1:
        before = probs[kept].cumsum() - probs[kept]
        kept = kept[before < sampling.top_p * probs[kept].sum()]
    kept = kept[probs[kept] >= sampling.min_p * probs.max()]
    cdf = np.where(np.isin(np.arange(VOCAB), kept), probs, 0.0).cumsum()
    (u,) = uniforms([sampling.seed], [row.position])
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def _assert_equal(found: SampledToken, expected: SampledToken) -> None:
    assert found.token_id == expected.token_id
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is not None and expected.logprobs is not None:
        assert found.logprobs.top_token_ids == expected.logprobs.top_token_ids
        assert found.logprobs.logprob == pytest.approx(expected.logprobs.logprob, rel=1e-6)
        assert found.logprobs.top_logprobs == pytest.approx(expected.logprobs.top_logprobs, rel=1e-6)


@given(batch=_batches)
@settings(max_examples=150)
def test_a_batch_gives_what_each_row_gives_the_plain_way(
    device: torch.device, batch: list[tuple[list[float], SamplingRow]]
) -> None:
    found = sample(torch.tensor([logits for logits, _ in batch]), [row for _, row in batch], device, [EOS])
    for token, (logits, row) in zip(found, batch, strict=True):
        _assert_equal(token, _one_by_one(logits, row))


@given(rows=st.lists(_rows, min_size=1, max_size=6), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=100)
def test_a_row_gives_the_same_token_alone_and_in_any_batch(
    device: torch.device, rows: list[SamplingRow], seed: int, data: st.DataObject
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    alone = [sample(logits[i : i + 1], [row], device, [EOS])[0] for i, row in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    together = sample(logits[order], [rows[i] for i in order], device, [EOS])
    assert list(together) == [alone[i] for i in order]


@pytest.mark.parametrize("vocab_size", [1000, 32001])
def test_a_row_of_a_large_vocabulary_gives_the_same_alone_and_in_any_batch(device: torch.device, vocab_size: int) -> None:
    logits = torch.randn(37, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    kinds: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 40, "num_logprobs": 3},
        {},
        {"temperature": 0.0},
        {"top_p": 0.999, "top_k": 800},
    ]
    rows = [_row(output=[i], **{"temperature": 1.5, "seed": i, **kinds[i % 5]}) for i in range(37)]
    together = sample(logits, rows, device)
    for i in (0, 1, 2, 3, 4, 36):
        assert sample(logits[i : i + 1], [rows[i]], device) == (together[i],)
    assert sample(logits[5:25], rows[5:25], device) == together[5:25]


@given(batch=_batches, last=st.lists(_token_ids, min_size=6, max_size=6), data=st.data())
@settings(max_examples=100)
def test_a_token_that_only_the_device_knows_counts_like_any_other(
    device: torch.device, batch: list[tuple[list[float], SamplingRow]], last: list[int], data: st.DataObject
) -> None:
    sampler = Sampler(VOCAB, [EOS], 6, device)
    # The launch before: its row i chooses last[i].
    sampler.launch(torch.eye(VOCAB)[last].to(device), [_row()] * 6).wait()
    logits = torch.tensor([logits for logits, _ in batch])
    sources = data.draw(st.lists(st.integers(-1, 5), min_size=len(batch), max_size=len(batch)))
    unknown = [replace(row, unknown_row=source) for (_, row), source in zip(batch, sources, strict=True)]
    known = [
        row if source < 0 else replace(row, token_ids=np.append(row.token_ids, np.int32(last[source])))
        for (_, row), source in zip(batch, sources, strict=True)
    ]
    assert [row.position for row in unknown] == [row.position for row in known]
    assert [row.num_output_tokens for row in unknown] == [row.num_output_tokens for row in known]
    assert sampler.launch(logits.clone().to(device), unknown).wait() == sample(logits, known, device, [EOS])


def test_a_launch_keeps_its_results_when_others_follow(device: torch.device) -> None:
    sampler = Sampler(4, (), 3, device)
    at = sampler.chosen.data_ptr()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(1 + i % 3, 4, generator=generator) for i in range(9)]
    rows = [_row(num_logprobs=4), _row(temperature=0.7, top_k=3, num_logprobs=1), _row(output=[2, 2], presence_penalty=1.0)]
    launched = [sampler.launch(logits.clone().to(device), rows[: len(logits)]) for logits in batches]
    for logits, step in zip(batches, launched, strict=True):
        tokens = step.wait()
        assert tokens == sample(logits, rows[: len(logits)], device)
    assert sampler.chosen.data_ptr() == at
    assert sampler.chosen.tolist() == [*(token.token_id for token in tokens), -1]


def test_chosen_is_what_was_chosen_and_rows_without_a_token_hold_minus_one(device: torch.device) -> None:
    sampler = Sampler(3, (), 5, device)
    assert sampler.chosen.tolist() == [-1] * 6
    logits = torch.tensor([[0.0, 1.0, 0.0], [math.nan, 1.0, 0.0], [2.0, 0.0, 0.0], [-math.inf] * 3, [0.0, math.inf, 0.0]])
    rows = [_row(), _row(), _row(temperature=1.0, top_k=1), _row(temperature=1.0), _row(num_logprobs=1)]
    sampler.launch(logits.to(device), rows)
    assert sampler.chosen.tolist() == [1, -1, 0, -1, -1, -1], "one more than rows, that is never chosen"
    assert sampler.chosen.dtype == torch.int32
    sampler.launch(torch.tensor([[0.0, 0.0, 1.0]]).to(device), [_row()])
    assert sampler.chosen.tolist() == [2, -1, 0, -1, -1, -1], "a launch of fewer rows writes only these"


def test_a_request_whose_last_token_could_not_be_chosen_harms_no_other(device: torch.device) -> None:
    sampler = Sampler(3, (), 2, device)
    sampler.launch(torch.full((2, 3), math.nan).to(device), [_row()] * 2)
    rows = [replace(_row(repetition_penalty=2.0, presence_penalty=1.0), unknown_row=1), _row()]
    assert sampler.launch(torch.tensor([[0.0, 5.0, 9.0], [0.0, 1.0, 0.0]]).to(device), rows).wait()[1].token_id == 1


def test_more_rows_or_another_vocabulary_than_told_are_refused(device: torch.device) -> None:
    sampler = Sampler(3, (), 1, device)
    with pytest.raises(AssertionError, match="2 rows, at most 1"):
        sampler.launch(torch.zeros(2, 3, device=device), [_row()] * 2)
    with pytest.raises(AssertionError, match=r"\(1, 4\)"):
        sampler.launch(torch.zeros(1, 4, device=device), [_row()])


@pytest.mark.gpu
def test_a_launch_waits_for_nothing() -> None:
    sampler = Sampler(64, [3], 8, torch.device("cuda"))
    everything = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
        "min_tokens": 9,
        "num_logprobs": 2,
    }
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}]
    rows = [_row(output=[5, 5], **kind) for kind in (*kinds, *(kind | everything for kind in kinds))]
    logits = torch.randn(6, 64, device="cuda")
    sampler.launch(logits.clone(), rows).wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not everything is detected
        torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.launch(logits.clone(), rows)
        launched = sampler.launch(logits.clone(), [replace(row, unknown_row=i) for i, row in enumerate(rows)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(token.token_id is not None for token in launched.wait())


@pytest.mark.gpu
def test_both_devices_choose_the_same_tokens() -> None:
    logits = torch.randn(42, 32000, generator=torch.Generator().manual_seed(2)) * 2
    # As a model in bfloat16 gives them: with many equals.
    logits[21:] = logits[21:].bfloat16().float()
    drawn = {"temperature": 1.3, "num_logprobs": 5}
    kinds: list[dict[str, Any]] = [
        {"num_logprobs": 20},
        drawn,
        drawn | {"top_p": 0.95},
        drawn | {"top_k": 50, "top_p": 0.7},
        drawn | {"top_k": 3000, "min_p": 0.001},
        drawn | {"repetition_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": 0.2, "top_p": 0.999},
        {"repetition_penalty": 1.7, "min_tokens": 99, "stop_token_ids": (0, 7)},
    ]
    rows = [_row(prompt=range(100), output=[i, i, i + 1], seed=i, **kinds[i % 7]) for i in range(42)]
    on_cpu, on_cuda = (sample(logits, rows, torch.device(device), [3]) for device in ("cpu", "cuda"))
    for found, expected in zip(on_cuda, on_cpu, strict=True):
        _assert_equal(found, expected)
