"""The log probabilities that requests ask for: of the token chosen, and of the likeliest ones. Knows nothing of sampling."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dataplane.model.step_inputs import Ints
from dataplane.runner.drawing import weight_scale, weights_of
from dataplane.runner.upload import Upload
from protos.planes import StepLogprobs


class Logprobs:
    """Computes them on the device from logits as the model gave them, packed as integers for one copy to the host."""

    def __init__(self, asked: Sequence[int], num_top: Sequence[int], vocab_size: int, upload: Upload) -> None:
        """asked: rows of the batch. num_top: how many alternatives each of them wants."""
        self._num_top = tuple(num_top)
        self._width = min(max(num_top), vocab_size)
        self._indices = upload.put(np.array(asked, dtype=np.int64))

    def raw(self, logits: torch.Tensor, upload: Upload) -> torch.Tensor:
        """A copy of the rows asked for, to be taken before the logits are changed."""
        return logits.index_select(0, upload[self._indices])

    def compute(self, raw: torch.Tensor, token_ids: torch.Tensor, upload: Upload) -> list[torch.Tensor]:
        """token_ids: [num_rows] int64, as chosen. Returns what `read` takes once it is on the host; int32, one-dimensional."""
        total = weights_of(raw, 1.0).sum(dim=-1, keepdim=True).double()
        largest = raw.amax(dim=-1, keepdim=True).double()
        # Normalized by an exact sum, in float64: the numbers of a row do not depend on its neighbours.
        log_total = total.log() - math.log(weight_scale(raw.shape[1]))
        # + 0.0 turns -0.0 into 0.0, its equal.
        logprobs = (raw - largest).sub_(log_total).float().add_(0.0)
        own = logprobs.gather(1, token_ids.index_select(0, upload[self._indices]).unsqueeze(1))
        if not self._width:
            return [own.view(torch.int32).flatten()]
        ids = _top_ids(logprobs, self._width)
        return [part.flatten() for part in (own.view(torch.int32), ids.int(), logprobs.gather(1, ids).view(torch.int32))]

    def read(self, packed: Ints) -> list[StepLogprobs]:
        """What `compute` returned, one after the other, on the host."""
        n, width = len(self._num_top), self._width
        own = packed[:n].view(np.float32).tolist()
        ids = packed[n : n + n * width].reshape(n, width).tolist()
        top = packed[n + n * width :].view(np.float32).reshape(n, width).tolist()
        by_row = zip(own, ids, top, self._num_top, strict=True)
        return [StepLogprobs(own, tuple(ids[:k]), tuple(top[:k])) for own, ids, top, k in by_row]


def _top_ids(logprobs: torch.Tensor, width: int) -> torch.Tensor:
    """Token ids of the largest logprobs of each row, [num_rows, width] int64; of equals the lowest ids come first."""
    bits = logprobs.view(torch.int32)
    # Integers in the order of the floats: of negative ones the bits of the magnitude count backwards.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    # No two keys are equal, so their order is one and the same on every device.
    return -(keys * 2**32 - ids).topk(width, dim=-1).values & 0xFFFFFFFF
