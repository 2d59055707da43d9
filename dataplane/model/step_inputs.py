"""What one step computes, on the host and on the device: the only thing the model is told. Knows nothing of requests or pools."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.lora import LoraAdapter

Ints = NDArray[np.int32]


def starts_of(lengths: Ints) -> Ints:
    """Where pieces of these lengths start that lie one behind the other, and where the last one ends, [n + 1]."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T tokens of R requests on the host, request by request, the decoding ones (one token each) first. S rows give logits.

    token_ids: [T], or -1 - i for the token that the step before chose in row i of its logits and that the host has not seen yet.
    positions: [T], place of each token in its request; rows of one request are consecutive positions that end at
        `context_lens[r] - 1`.
    slots: [T], page_id * page_tokens + offset: where each token's K and V go.
    query_starts: [R + 1], rows of request r are query_starts[r]:query_starts[r + 1].
    context_lens: [R], tokens in KV once this step's are written.
    page_starts: [R + 1], pages of request r are page_ids[page_starts[r]:page_starts[r + 1]], in the order of the tokens they
        hold, no more than its context needs.
    logits_rows: [S], ascending rows whose logits are wanted.
    adapter_index: [T], index into `adapters`, -1 for a token of the base model.
    num_decodes: how many of the requests lead with one token each. A step of decodes alone has R of them, and S = T = R.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    context_lens: Ints
    page_starts: Ints
    page_ids: Ints
    logits_rows: Ints
    adapter_index: Ints
    adapters: tuple[LoraAdapter, ...]
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.context_lens)

    @property
    def is_decode(self) -> bool:
        """Whether every request decodes."""
        return self.num_decodes == self.num_requests


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step as kernels read it. Rows past T are padding: token 0 at position 0, written to a slot that no request owns.

    The tensors lie at the same addresses in every step of as many rows, so that a captured graph may read them.

    host: the same step on the host.
    token_ids, positions: [P] int32, P >= T.
    slot_pages, slot_offsets: [P] int32, page of each token and its place there.
    logits_rows: [S] int32.
    """

    host: StepArrays
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_pages: torch.Tensor
    slot_offsets: torch.Tensor
    logits_rows: torch.Tensor
