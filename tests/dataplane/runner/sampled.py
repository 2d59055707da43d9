"""Rows to sample, and what a sampler of their own chooses for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataplane.runner.sampling import SampledToken, Sampler, SamplingRow
from protos.planes import EngineSampling

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def make_row(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **sampling: Any) -> SamplingRow:
    """A row of a request with this prompt and output; greedy unless told otherwise."""
    params = EngineSampling(**{"max_tokens": 100, **sampling})
    return SamplingRow(params, np.array([*prompt, *output], dtype=np.int32), len(prompt))


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow], device: torch.device, eos: Sequence[int] = ()
) -> tuple[SampledToken, ...]:
    """What a sampler of its own chooses, row by row."""
    sampler = Sampler(logits.shape[1], eos, max(1, len(rows)), device)
    return sampler.launch(logits.clone().to(device), rows).wait()


def choose(device: torch.device, logits: Sequence[float], row: SamplingRow, eos: Sequence[int] = ()) -> int | None:
    """The token that a sampler of its own chooses for one row."""
    (sampled,) = sample(torch.tensor([logits]), [row], device, eos)
    return sampled.token_id
