"""A step arrives as it was written, padded with what harms nobody, and with the tokens that the host has not seen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.model.step_inputs import Ints, StepArrays
from dataplane.runner.step_buffers import StepBuffers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGE_TOKENS = 4
PADDING_PAGE = 99
MAX_ROWS = 32


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def _step(token_ids: list[int], positions: list[int], slots: list[int], logits_rows: list[int]) -> StepArrays:
    """Only what travels."""
    none = _ints([])
    return StepArrays(_ints(token_ids), _ints(positions), _ints(slots), none, none, none, none, _ints(logits_rows), none, (), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_past_the_step_are_token_0_in_the_padding_page(device: str) -> None:
    buffers = StepBuffers(MAX_ROWS, PAGE_TOKENS, PADDING_PAGE, torch.device(device))
    buffers.upload(_step([9] * 8, [9] * 8, [9] * 8, [7]), 8)
    inputs = buffers.upload(_step([5, 6, 7], [10, 0, 1], [42, 8, 9], [0, 2]), 8)
    assert inputs.token_ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert inputs.positions.tolist() == [10, 0, 1, 0, 0, 0, 0, 0]
    assert inputs.slot_pages.tolist() == [10, 2, 2, *[PADDING_PAGE] * 5]
    assert inputs.slot_offsets.tolist() == [2, 0, 1, 0, 0, 0, 0, 0]
    assert inputs.logits_rows.tolist() == [0, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_unknown_tokens_are_those_that_the_last_step_chose(device: str) -> None:
    buffers = StepBuffers(MAX_ROWS, PAGE_TOKENS, PADDING_PAGE, torch.device(device))
    chosen = torch.tensor([70, -1, 72, -1], dtype=torch.int32, device=device)
    inputs = buffers.upload(_step([-3, 6, -1, -2, 0], [0] * 5, [0] * 5, []), 7, chosen)
    assert inputs.token_ids.tolist() == [72, 6, 70, 0, 0, 0, 0], "where nothing could be chosen, anything may be computed"
    inputs = buffers.upload(_step([6, 5], [0] * 2, [0] * 2, []), 7, chosen)
    assert inputs.token_ids.tolist() == [6, 5, 0, 0, 0, 0, 0]


def test_a_token_that_nobody_knows_is_refused() -> None:
    buffers = StepBuffers(MAX_ROWS, PAGE_TOKENS, PADDING_PAGE, torch.device("cpu"))
    with pytest.raises(AssertionError, match="2 tokens that nobody knows"):
        buffers.upload(_step([-3, 6, -1], [0] * 3, [0] * 3, []), 6)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_one_size_lie_at_one_address(device: str) -> None:
    buffers = StepBuffers(MAX_ROWS, PAGE_TOKENS, PADDING_PAGE, torch.device(device))

    def addresses(num_rows: int) -> list[int]:
        inputs = buffers.upload(_step([-1], [0], [0], [0]), num_rows, torch.zeros(4, dtype=torch.int32, device=device))
        fields = (inputs.token_ids, inputs.positions, inputs.slot_pages, inputs.slot_offsets, inputs.logits_rows)
        return [field.data_ptr() for field in fields]

    first = addresses(8)
    addresses(32)
    assert addresses(8) == first


@pytest.mark.gpu
@given(steps=st.lists(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=MAX_ROWS), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_a_step_that_is_written_while_others_wait_for_the_device_overwrites_none_of_them(steps: list[list[int]]) -> None:
    device = torch.device("cuda")
    buffers = StepBuffers(MAX_ROWS, PAGE_TOKENS, PADDING_PAGE, device)
    arrived = []
    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # torch has no type for it
    for step in steps:
        inputs = buffers.upload(_step(step, [0] * len(step), [0] * len(step), []), MAX_ROWS)
        arrived.append(inputs.token_ids.clone())
    assert [tokens[: len(step)].tolist() for tokens, step in zip(arrived, steps, strict=True)] == steps
