"""Draws tokens by temperature, top_k, top_p and min_p. Knows logits and parameters, and nothing of requests.

Probabilities are integers here: weights, in units of a tiny fraction of the row's likeliest token. Their sums are exact in any
order that a device adds them, so what is drawn for a row does not depend on the shape of the batch. The random number of a token
is a pure function of (seed, position), so a request draws the same numbers in any batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dataplane.runner.sampling_row import SamplingRow
from dataplane.runner.upload import Upload
from kernels.truncation import Truncation
from protos.planes import EngineSampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Draw:
    """One token for each row with a temperature: parameters are put together on the host, the rest happens on the device."""

    def __init__(
        self, rows: Sequence[SamplingRow], drawn: Sequence[int], vocab_size: int, truncate: Truncation, upload: Upload
    ) -> None:
        """drawn: the rows that have a temperature. truncate: does top_k and top_p."""
        # First those that are truncated, so that they can be had as a slice.
        drawn = sorted(drawn, key=lambda i: not _is_truncated(rows[i].sampling))
        samplings = [rows[i].sampling for i in drawn]
        truncated = [s for s in samplings if _is_truncated(s)]
        self._is_all = drawn == list(range(len(rows)))
        self._num_truncated = len(truncated)
        self._truncate = truncate
        self._indices = upload.put(np.array(drawn, dtype=np.int64))
        self._temperatures = upload.put(np.array([s.temperature for s in samplings], dtype=np.float64))
        self._uniforms = upload.put(uniforms([s.seed for s in samplings], [rows[i].position for i in drawn]))
        if truncated:
            self._top_k = upload.put(np.array([min(s.top_k or vocab_size, vocab_size) for s in truncated], dtype=np.int64))
            self._top_p = upload.put(np.array([s.top_p for s in truncated], dtype=np.float64))
        self._has_min_p = any(s.min_p for s in samplings)
        if self._has_min_p:
            least = np.array([s.min_p for s in samplings], dtype=np.float64) * weight_scale(vocab_size)
            self._least = upload.put(np.ceil(least).astype(np.int64))

    def into(self, token_ids: torch.Tensor, logits: torch.Tensor, upload: Upload) -> None:
        """Writes the tokens drawn in their rows of token_ids, [num_rows] int64. logits: [num_rows, vocab] float32."""
        indices = upload[self._indices]
        logits = logits if self._is_all else logits.index_select(0, indices)
        weights = weights_of(logits, upload[self._temperatures].unsqueeze(1))
        if self._num_truncated:
            self._truncate(weights[: self._num_truncated], upload[self._top_k], upload[self._top_p])
        if self._has_min_p:
            weights.masked_fill_(weights < upload[self._least].unsqueeze(1), 0)
        # The inverse of the distribution function, in order of token id.
        sums = weights.cumsum_(-1)
        # Below the total even when rounded: u is at least 2**-48 below 1.
        target = (upload[self._uniforms].unsqueeze(1) * sums[:, -1:].double()).long()
        drawn = torch.searchsorted(sums, target, right=True).squeeze(1)
        # Clamped for rows without any weight, whose token is thrown away.
        token_ids.index_copy_(0, indices, drawn.clamp_(max=logits.shape[1] - 1))


def _is_truncated(sampling: EngineSampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): SplitMix64 over the position, in a sequence that the seed selects."""
    seed, position = np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    # Mixed before the position is added: else neighbouring seeds would give the same numbers at shifted positions.
    bits = _mix(_mix(seed + _GOLDEN) + (position + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def weight_scale(vocab_size: int) -> int:
    """The weight of a row's likeliest token: as large as leaves the sum of a row below 2**62, and exact in float64."""
    return int(2 ** min(52, 62 - vocab_size.bit_length()))


def weights_of(logits: torch.Tensor, temperatures: torch.Tensor | float) -> torch.Tensor:
    """weight_scale * exp((logit - largest) / temperature), [num_rows, vocab] int64; 0 where that is not a number."""
    largest = logits.amax(dim=-1, keepdim=True).double()
    share = (logits - largest).div_(temperatures).exp_()
    return share.mul_(weight_scale(logits.shape[1])).nan_to_num_(nan=0.0).long()
