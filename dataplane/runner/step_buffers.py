"""Brings a step to the device: one copy of one staging buffer, at addresses that never change. Knows nothing of requests."""

import numpy as np
import torch

from dataplane.model.step_inputs import Ints, StepArrays, StepInputs

# Rows of the buffers: token ids, positions, pages and offsets of slots, rows of logits.
_NUM_FIELDS = 5


class StepBuffers:
    """The device's copy of the current step, and the tokens that the last one chose.

    On CUDA, two pinned stagings: the next step is written while the copy of this one may not have run yet.
    """

    def __init__(self, max_rows: int, page_tokens: int, padding_page: int, device: torch.device) -> None:
        """max_rows: of the largest step, padding included. padding_page: a page that no request owns."""
        self._max_rows = max_rows
        self._page_tokens = page_tokens
        self._padding = np.array([0, 0, padding_page, 0, 0], dtype=np.int32)
        self._device = device
        is_cuda = device.type == "cuda"
        shape = (_NUM_FIELDS, max_rows)
        self._stagings = [torch.zeros(shape, dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if is_cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]  # torch has no type for it
        self._on_device = torch.zeros(_NUM_FIELDS * max_rows, dtype=torch.int32, device=device)
        self._num_uploads = 0

    def upload(self, step: StepArrays, num_rows: int, chosen: torch.Tensor | None = None) -> StepInputs:
        """Starts the copy of a step, padded to num_rows, behind what the current stream has to do.

        chosen: [max_num_seqs] int32, the tokens that the step before chose, on the device; None if the host knows them all.
        """
        assert step.num_tokens <= num_rows <= self._max_rows, f"{step.num_tokens} tokens in {num_rows} of {self._max_rows} rows"
        turn = self._num_uploads % 2
        self._num_uploads += 1
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()  # of the upload before the last one: long done
        # Packed to what this step needs, so that little is copied; the addresses of a step of num_rows are always the same.
        staging = self._stagings[turn].view(-1)[: _NUM_FIELDS * num_rows]
        self._write(staging.numpy().reshape(_NUM_FIELDS, num_rows), step)
        on_device = self._on_device[: len(staging)]
        on_device.copy_(staging, non_blocking=True)
        if copied is not None:
            copied.record()
        token_ids, positions, slot_pages, slot_offsets, logits_rows = on_device.view(_NUM_FIELDS, num_rows)
        if chosen is not None:
            # In place, so that the address stays; a row of which no token could be chosen (-1) computes something harmless.
            sources = (-1 - token_ids).clamp_(min=0)
            token_ids.copy_(torch.where(token_ids < 0, chosen.index_select(0, sources).clamp_(min=0), token_ids))
        return StepInputs(step, token_ids, positions, slot_pages, slot_offsets, logits_rows[: len(step.logits_rows)])

    def _write(self, rows: Ints, step: StepArrays) -> None:
        n = step.num_tokens
        rows[:, n:] = self._padding[:, None]
        rows[0, :n] = step.token_ids
        rows[1, :n] = step.positions
        np.floor_divide(step.slots, self._page_tokens, out=rows[2, :n])
        np.remainder(step.slots, self._page_tokens, out=rows[3, :n])
        rows[4, : len(step.logits_rows)] = step.logits_rows
