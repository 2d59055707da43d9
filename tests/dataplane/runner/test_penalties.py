"""What penalties make of logits, and what may not be chosen before min_tokens."""

import pytest
import torch

from tests.dataplane.runner.sampled import choose, make_row


def test_repetition_penalty_covers_prompt_and_output(device: torch.device) -> None:
    logits = [4.0, 3.9, 3.8, -0.1, -0.2]
    assert choose(device, logits, make_row(prompt=[0], output=[1], repetition_penalty=1.5)) == 2
    # Negative logits grow more negative: dividing them would reward the repetition.
    assert choose(device, [-0.1, -0.15], make_row(prompt=[0], repetition_penalty=2.0)) == 1


@pytest.mark.parametrize(("penalty", "token_id"), [(1e-45, 0), (1e38, 1)])
def test_the_strongest_repetition_penalty_still_gives_a_token(device: torch.device, penalty: float, token_id: int) -> None:
    assert choose(device, [4.0, 3.0, -9.0], make_row(prompt=[0], output=[2], repetition_penalty=penalty)) == token_id


def test_presence_and_frequency_penalties_cover_the_output_alone(device: torch.device) -> None:
    assert choose(device, [2.0, 1.0, 0.0], make_row(prompt=[0, 0], presence_penalty=2.0, frequency_penalty=2.0)) == 0
    assert choose(device, [2.0, 1.0, 0.0], make_row(output=[0], presence_penalty=1.5)) == 1
    assert choose(device, [2.0, 1.0, 0.0], make_row(output=[0, 0], presence_penalty=0.6)) == 0
    assert choose(device, [2.0, 1.0, 0.0], make_row(output=[0, 0], frequency_penalty=0.6)) == 1


def test_nothing_that_ends_a_request_comes_before_min_tokens(device: torch.device) -> None:
    early = make_row(output=[3], min_tokens=2, stop_token_ids=(1, 900))
    assert choose(device, [9.0, 8.0, 7.0], early, eos=[0]) == 2
    late = make_row(output=[3, 3], min_tokens=2, stop_token_ids=(1,))
    assert choose(device, [9.0, 8.0, 7.0], late, eos=[0]) == 0
    assert choose(device, [9.0, 8.0, 7.0], make_row(min_tokens=2, ignore_eos=True), eos=[0]) == 0, (
        "with ignore_eos, EOS ends nothing"
    )
