"""What a sampler chooses and tells: the likeliest token, logprobs, rows without a token, launch after launch."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from dataplane.runner.sampling import Sampler
from tests.dataplane.runner.sampled import LOGITS, choose, make_row, sample


def test_greedy_takes_the_lowest_of_equal_maxima(device: torch.device) -> None:
    assert choose(device, [0.0, 3.0, 1.0, 3.0, 3.0], make_row()) == 1


def test_of_equal_logprobs_the_lowest_ids_are_told(device: torch.device) -> None:
    rows = [make_row(num_logprobs=n) for n in (2, None, 3)]
    first, without, second = sample(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]] * 3), rows, device)
    assert first.logprobs is not None and first.logprobs.top_token_ids == (1, 2)
    assert without.logprobs is None
    assert second.logprobs is not None and second.logprobs.top_token_ids == (1, 2, 3)


def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf], [1.0, 0.0]])
    rows = [
        make_row(),
        make_row(temperature=1.0, num_logprobs=1),
        make_row(temperature=1.0),
        make_row(temperature=1.0),
        make_row(),
    ]
    sampled = sample(logits, rows, device)
    assert [s.token_id for s in sampled] == [1, None, None, None, 0]
    assert sampled[1].logprobs is None


def test_logprobs_are_of_the_raw_logits(device: torch.device) -> None:
    row = make_row(output=[0], temperature=7.0, top_k=1, presence_penalty=2.0, min_tokens=5, num_logprobs=3)
    (sampled,) = sample(torch.tensor([LOGITS]), [row], device, [1])
    expected = torch.tensor(LOGITS).log_softmax(0)
    assert sampled.token_id is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == (0, 1, 2)
    assert sampled.logprobs.top_logprobs == pytest.approx(expected[:3].tolist())
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token_id].item())


def test_zero_alternatives_give_the_chosen_tokens_logprob_alone(device: torch.device) -> None:
    (sampled,) = sample(torch.tensor([LOGITS]), [make_row(num_logprobs=0)], device)
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_token_ids == ()
    assert sampled.logprobs.logprob == pytest.approx(torch.tensor(LOGITS).log_softmax(0)[0].item())


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    assert sample(torch.empty(0, 5), [], device) == ()


def test_a_launch_keeps_its_results_when_others_follow(device: torch.device) -> None:
    sampler = Sampler(4, (), 3, device)
    at = sampler.chosen.data_ptr()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(1 + i % 3, 4, generator=generator) for i in range(9)]
    rows = [
        make_row(num_logprobs=4),
        make_row(temperature=0.7, top_k=3, num_logprobs=1),
        make_row(output=[2, 2], presence_penalty=1.0),
    ]
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
    rows = [make_row(), make_row(), make_row(temperature=1.0, top_k=1), make_row(temperature=1.0), make_row(num_logprobs=1)]
    sampler.launch(logits.to(device), rows)
    assert sampler.chosen.tolist() == [1, -1, 0, -1, -1, -1], "one more than rows, that is never chosen"
    assert sampler.chosen.dtype == torch.int32
    sampler.launch(torch.tensor([[0.0, 0.0, 1.0]]).to(device), [make_row()])
    assert sampler.chosen.tolist() == [2, -1, 0, -1, -1, -1], "a launch of fewer rows writes only these"


def test_a_request_whose_last_token_could_not_be_chosen_harms_no_other(device: torch.device) -> None:
    sampler = Sampler(3, (), 2, device)
    sampler.launch(torch.full((2, 3), math.nan).to(device), [make_row()] * 2)
    rows = [replace(make_row(repetition_penalty=2.0, presence_penalty=1.0), unknown_row=1), make_row()]
    assert sampler.launch(torch.tensor([[0.0, 5.0, 9.0], [0.0, 1.0, 0.0]]).to(device), rows).wait()[1].token_id == 1


def test_more_rows_or_another_vocabulary_than_told_are_refused(device: torch.device) -> None:
    sampler = Sampler(3, (), 1, device)
    with pytest.raises(AssertionError, match="2 rows, at most 1"):
        sampler.launch(torch.zeros(2, 3, device=device), [make_row()] * 2)
    with pytest.raises(AssertionError, match=r"\(1, 4\)"):
        sampler.launch(torch.zeros(1, 4, device=device), [make_row()])


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
    rows = [make_row(output=[5, 5], **kind) for kind in (*kinds, *(kind | everything for kind in kinds))]
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
