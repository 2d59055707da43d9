"""Changes logits before a token is chosen: penalties for repetition, and no end before min_tokens. Chooses nothing."""

from collections.abc import Sequence

import numpy as np
import torch

from dataplane.runner.sampling_row import SamplingRow
from dataplane.runner.upload import Upload

_LARGEST = torch.finfo(torch.float32).max


class Penalties:
    """What is to be changed in the logits of a batch: put together on the host, applied on the device after the upload."""

    def __init__(self, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int], vocab_size: int, upload: Upload) -> None:
        samplings = [row.sampling for row in rows]
        repeated = [i for i, s in enumerate(samplings) if s.repetition_penalty != 1.0]
        counted = [i for i, s in enumerate(samplings) if s.presence_penalty or s.frequency_penalty]
        counted = [i for i in counted if rows[i].num_output_tokens]
        early = [i for i, s in enumerate(samplings) if s.min_tokens and rows[i].num_output_tokens < s.min_tokens]
        self._repetition = _Repetition(rows, repeated, upload) if repeated else None
        self._usage = _Usage(rows, counted, vocab_size, upload) if counted else None
        self._ends = _Ends(rows, early, eos_token_ids, vocab_size, upload) if early else None

    def apply(self, logits: torch.Tensor, chosen: torch.Tensor, upload: Upload) -> None:
        """logits: [num_rows, vocab] float32, in place. chosen: what the launch before chose."""
        if self._repetition is not None:
            self._repetition.apply(logits, chosen, upload)
        if self._usage is not None:
            self._usage.apply(logits, chosen, upload)
        if self._ends is not None:
            self._ends.apply(logits, upload)


class _RaggedTokens:
    """Tokens of some of the rows, one row after the other, with those that only the device knows."""

    def __init__(self, rows: Sequence[SamplingRow], indices: Sequence[int], with_prompt: bool, upload: Upload) -> None:
        parts = []
        for row in (rows[i] for i in indices):
            parts.append(row.token_ids if with_prompt else row.token_ids[row.num_prompt_tokens :])
            if row.unknown_row >= 0:
                parts.append(np.array([-1 - row.unknown_row], dtype=np.int32))
        lengths = [rows[i].position if with_prompt else rows[i].num_output_tokens for i in indices]
        self._num_tokens = sum(lengths)
        self._has_unknown = any(rows[i].unknown_row >= 0 for i in indices)
        self._indices = upload.put(np.array(indices, dtype=np.int64))
        self._lengths = upload.put(np.array(lengths, dtype=np.int64))
        self._token_ids = upload.put(np.concatenate(parts))

    def read(self, chosen: torch.Tensor, upload: Upload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each token, which of the indices it belongs to, that row of the batch, and its id; all [num_tokens] int64."""
        which = torch.repeat_interleave(upload[self._lengths], output_size=self._num_tokens)
        token_ids = upload[self._token_ids].long()
        if self._has_unknown:
            # A row of which no token could be chosen (-1) penalizes something harmless: its request ends.
            known = chosen.index_select(0, (-1 - token_ids).clamp_(min=0)).clamp_(min=0)
            token_ids = torch.where(token_ids < 0, known, token_ids)
        return which, upload[self._indices].index_select(0, which), token_ids


class _Repetition:
    """Makes every token of prompt and output less likely by a factor."""

    def __init__(self, rows: Sequence[SamplingRow], indices: Sequence[int], upload: Upload) -> None:
        self._tokens = _RaggedTokens(rows, indices, True, upload)
        self._factors = upload.put(np.array([rows[i].sampling.repetition_penalty for i in indices], dtype=np.float32))

    def apply(self, logits: torch.Tensor, chosen: torch.Tensor, upload: Upload) -> None:
        which, rows, token_ids = self._tokens.read(chosen, upload)
        factors = upload[self._factors].index_select(0, which)
        value = logits[rows, token_ids]
        value = torch.where(value > 0, value / factors, value * factors)
        # A penalty near 0 (or a huge one) is a strong wish, not a broken logit. A token that is there twice is written twice
        # with the same value.
        logits[rows, token_ids] = value.clamp_(-_LARGEST, _LARGEST)


class _Usage:
    """Makes tokens of the output less likely: by presence once, by frequency for each time."""

    def __init__(self, rows: Sequence[SamplingRow], indices: Sequence[int], vocab_size: int, upload: Upload) -> None:
        self._num_rows = len(indices)
        self._vocab_size = vocab_size
        self._tokens = _RaggedTokens(rows, indices, False, upload)
        self._presence = upload.put(np.array([rows[i].sampling.presence_penalty for i in indices], dtype=np.float32))
        self._frequency = upload.put(np.array([rows[i].sampling.frequency_penalty for i in indices], dtype=np.float32))

    def apply(self, logits: torch.Tensor, chosen: torch.Tensor, upload: Upload) -> None:
        which, rows, token_ids = self._tokens.read(chosen, upload)
        places = which * self._vocab_size + token_ids
        counts = torch.zeros(self._num_rows * self._vocab_size, dtype=torch.int32, device=logits.device)
        counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        times = counts.index_select(0, places).float()
        penalty = upload[self._presence].index_select(0, which) + upload[self._frequency].index_select(0, which) * times
        # Read in full before any is written, so a token that is there twice is written twice with the same value.
        logits[rows, token_ids] = logits[rows, token_ids] - penalty


class _Ends:
    """Forbids every token that would end a request too early."""

    def __init__(
        self, rows: Sequence[SamplingRow], indices: Sequence[int], eos_token_ids: Sequence[int], vocab_size: int, upload: Upload
    ) -> None:
        places = []
        for i in indices:
            sampling = rows[i].sampling
            ends = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids))
            places += [(i, token_id) for token_id in ends if token_id < vocab_size]
        self._is_empty = not places
        if places:
            row_of, token_ids = np.array(places, dtype=np.int64).T
            self._rows, self._token_ids = upload.put(row_of), upload.put(token_ids)

    def apply(self, logits: torch.Tensor, upload: Upload) -> None:
        if not self._is_empty:
            logits.index_put_((upload[self._rows], upload[self._token_ids]), logits.new_full((), -torch.inf))
