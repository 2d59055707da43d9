"""Brings a step to the device: in one upload, at addresses that never change. Knows nothing of requests."""

import numpy as np
import torch

from dataplane.model.step_inputs import Ints, StepArrays, StepInputs
from kernels.uploads import upload

# Rows of the buffers: token ids, positions, pages and offsets of slots, rows of logits, where unknown tokens are chosen.
_NUM_FIELDS = 6


class StepBuffers:
    """The current step on the device, where the tokens are filled in that the host has not seen."""

    def __init__(self, max_rows: int, page_tokens: int, padding_page: int, device: torch.device) -> None:
        """max_rows: of the largest step, padding included. padding_page: a page that no request owns."""
        self._max_rows = max_rows
        self._page_tokens = page_tokens
        self._padding = np.array([0, 0, padding_page, 0, 0, 0], dtype=np.int32)
        self._on_host = torch.zeros(_NUM_FIELDS * max_rows, dtype=torch.int32)
        self._on_device = torch.zeros(_NUM_FIELDS * max_rows, dtype=torch.int32, device=device)

    def upload(self, step: StepArrays, num_rows: int, chosen: torch.Tensor | None = None) -> StepInputs:
        """Starts the copy of a step, padded to num_rows, behind what the current stream has to do.

        chosen: [max_num_seqs + 1] int32 on the device, what the step before chose: -1 where no token could be, and at the end.
            None if the host knows all tokens.
        """
        assert step.num_tokens <= num_rows <= self._max_rows, f"{step.num_tokens} tokens in {num_rows} of {self._max_rows} rows"
        unknown = np.flatnonzero(step.token_ids < 0)
        # Packed to what this step needs, so that little is copied; the addresses of a step of num_rows are always the same.
        num_ints = _NUM_FIELDS * num_rows
        on_host, on_device = self._on_host[:num_ints], self._on_device[:num_ints]
        rows = on_host.numpy().reshape(_NUM_FIELDS, num_rows)
        self._write(rows, step)
        if len(unknown):
            assert chosen is not None, f"{len(unknown)} tokens that nobody knows"
            rows[0, unknown] = 0
            rows[5] = len(chosen) - 1
            rows[5, unknown] = -1 - step.token_ids[unknown]
        upload(on_device, on_host)
        token_ids, positions, slot_pages, slot_offsets, logits_rows, sources = on_device.view(_NUM_FIELDS, num_rows)
        if chosen is not None and len(unknown):
            # Of 0 and a token it is the token, of a known one and -1 the known one, and where none could be chosen it is 0, which
            # is harmless. In place, so that the address stays.
            torch.maximum(token_ids, chosen.index_select(0, sources), out=token_ids)
        return StepInputs(step, token_ids, positions, slot_pages, slot_offsets, logits_rows[: len(step.logits_rows)])

    def _write(self, rows: Ints, step: StepArrays) -> None:
        n = step.num_tokens
        rows[:, n:] = self._padding[:, None]
        rows[0, :n] = step.token_ids
        rows[1, :n] = step.positions
        np.floor_divide(step.slots, self._page_tokens, out=rows[2, :n])
        np.remainder(step.slots, self._page_tokens, out=rows[3, :n])
        rows[4, : len(step.logits_rows)] = step.logits_rows
