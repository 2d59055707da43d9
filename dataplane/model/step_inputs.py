"""What one step computes, as tensors and offsets: the only thing the model is told. Knows nothing of requests or pools."""

from dataclasses import dataclass

import torch

from kernels.lora import LoraAdapter


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens of R requests, request by request; S of the rows have their logits computed.

    token_ids: [T] int64.
    positions: [T] int64, place of each token in its request; rows of one request are consecutive positions that end at
        `context_lens[r] - 1`.
    slots: [T] int64, page_id * page_tokens + offset: where each token's K and V go.
    query_starts: [R + 1], rows of request r are query_starts[r]:query_starts[r + 1].
    context_lens: [R], tokens in KV once this step's are written.
    page_tables: [R], page ids in the order of the tokens they hold.
    logits_rows: [S] int64, rows whose logits are wanted.
    adapter_index: [T], index into `adapters`, -1 for a token of the base model.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_tables: tuple[tuple[int, ...], ...]
    logits_rows: torch.Tensor
    adapter_index: tuple[int, ...]
    adapters: tuple[LoraAdapter, ...]
