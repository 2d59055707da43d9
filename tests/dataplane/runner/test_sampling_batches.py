"""A row is given what it is given alone and the plain way: in any batch, on either device, wherever its last token is known."""

import math
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
from protos.planes import StepLogprobs
from tests.dataplane.runner.sampled import make_row, sample

VOCAB = 12
EOS = 5
# Coarse, so that many are equal and the rest are far apart.
_logits = st.lists(st.sampled_from([-math.inf, -2.5, -1.0, 0.0, 0.5, 0.75, 3.0]), min_size=VOCAB, max_size=VOCAB).filter(
    lambda row: max(row) > -math.inf
)
_token_ids = st.integers(0, VOCAB - 1)
_rows = st.builds(
    make_row,
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
    rows = [make_row(output=[i], **{"temperature": 1.5, "seed": i, **kinds[i % 5]}) for i in range(37)]
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
    sampler.launch(torch.eye(VOCAB)[last].to(device), [make_row()] * 6).wait()
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
    rows = [make_row(prompt=range(100), output=[i, i, i + 1], seed=i, **kinds[i % 7]) for i in range(42)]
    on_cpu, on_cuda = (sample(logits, rows, torch.device(device), [3]) for device in ("cpu", "cuda"))
    for found, expected in zip(on_cuda, on_cpu, strict=True):
        _assert_equal(found, expected)
