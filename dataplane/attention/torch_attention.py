"""Attention over the page pool in plain torch, on any device: gathers pages and leaves the arithmetic to torch.

Knows pages and slots as numbers; nothing of requests, of what else lies in the pool, or of the model around it.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from dataplane.attention.interface import AttentionBackend, AttentionPlan, KvPages
from dataplane.model.step_inputs import StepArrays, StepInputs

# Tokens of K and V that one batched call may gather: bounds the temporary copies, whatever the batch.
MAX_GATHERED_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """G requests with n query rows each that read as many pages each, so that they form one dense batch.

    rows: [G, n] int64. page_tables: [G, P] int64.
    mask: [G, 1, n, P * page_tokens] bool, True where a query attends.
    unwritten: [G, P * page_tokens, 1, 1] bool, True past the end of the request: whatever bytes the page held before.
    """

    rows: torch.Tensor
    page_tables: torch.Tensor
    mask: torch.Tensor
    unwritten: torch.Tensor


@dataclass(frozen=True, slots=True)
class TorchAttentionPlan(AttentionPlan):
    """The step, and the groups of requests by sliding window, made when the first layer asks for them."""

    step: StepArrays
    q: torch.Tensor
    out: torch.Tensor
    groups: dict[int | None, tuple[AttentionGroup, ...]] = field(default_factory=dict)


class TorchAttention(AttentionBackend):
    """Gathers pages and leaves the arithmetic to torch.

    Requests of equal shape share a call; a request is padded to whole pages of its own and never to another's length, so
    its sums do not depend on who else is in the batch.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens

    def append(self, k: torch.Tensor, v: torch.Tensor, pages: KvPages, inputs: StepInputs) -> None:
        """Writes the rows' keys and values to their slots, padding rows' too."""
        pages.k[inputs.slot_pages, inputs.slot_offsets] = k
        pages.v[inputs.slot_pages, inputs.slot_offsets] = v

    def plan(self, inputs: StepInputs, q: torch.Tensor, out: torch.Tensor) -> TorchAttentionPlan:
        """Prepares one step."""
        return TorchAttentionPlan(inputs.host, q, out)

    def attend(self, plan: AttentionPlan, pages: KvPages, sliding_window: int | None) -> None:
        """Attends causally through the page tables."""
        assert isinstance(plan, TorchAttentionPlan), f"plan of another backend: {type(plan).__name__}"
        if sliding_window not in plan.groups:
            plan.groups[sliding_window] = self._groups(plan.step, sliding_window, plan.q.device)
        for group in plan.groups[sliding_window]:
            plan.out[group.rows] = _attend(plan.q[group.rows], pages, group)

    def _groups(self, step: StepArrays, sliding_window: int | None, device: torch.device) -> tuple[AttentionGroup, ...]:
        """Requests by (query rows, pages read), cut so that no group gathers more than MAX_GATHERED_TOKENS."""
        members: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        row_counts = np.diff(step.query_starts).tolist()
        for r, (context_len, num_rows) in enumerate(zip(step.context_lens.tolist(), row_counts, strict=True)):
            if num_rows == 0:
                continue
            first_page = 0
            if sliding_window is not None:
                first_page = max(0, context_len - num_rows - sliding_window + 1) // self._page_tokens
            num_pages = -(-context_len // self._page_tokens) - first_page
            members[num_rows, num_pages].append((r, first_page))
        groups = []
        for (num_rows, num_pages), requests in members.items():
            size = max(1, MAX_GATHERED_TOKENS // (num_pages * self._page_tokens))
            for start in range(0, len(requests), size):
                chunk = requests[start : start + size]
                groups.append(self._group(step, chunk, num_rows, num_pages, sliding_window, device))
        return tuple(groups)

    def _group(
        self,
        step: StepArrays,
        requests: list[tuple[int, int]],
        num_rows: int,
        num_pages: int,
        sliding_window: int | None,
        device: torch.device,
    ) -> AttentionGroup:
        """One group of (request, first page read) pairs."""
        num_keys = num_pages * self._page_tokens
        numbers, first_pages = np.array(requests, dtype=np.int64).T
        meta = np.stack((step.query_starts[numbers], step.context_lens[numbers], first_pages * self._page_tokens))
        first_row, context_len, first_key = torch.from_numpy(meta.astype(np.int64)).to(device)[:, :, None]
        tables = step.page_ids[(step.page_starts[numbers] + first_pages)[:, None] + np.arange(num_pages)]
        steps = torch.arange(num_rows, device=device)
        queries = (context_len - num_rows + steps)[:, :, None]
        keys = (first_key + torch.arange(num_keys, device=device))[:, None, :]
        mask = keys <= queries
        if sliding_window is not None:
            mask &= keys > queries - sliding_window
        return AttentionGroup(
            rows=first_row + steps,
            page_tables=torch.from_numpy(tables.astype(np.int64)).to(device),
            mask=mask[:, None],
            unwritten=(keys[:, 0] >= context_len)[:, :, None, None],
        )


def _attend(q: torch.Tensor, pages: KvPages, group: AttentionGroup) -> torch.Tensor:
    """Attention of one group: q [G, n, num_heads, head_dim] to the same shape."""
    k, v = (side[group.page_tables].flatten(1, 2) for side in (pages.k, pages.v))
    # A mask does not hide a NaN (0 * NaN in the sum over V), so what no one wrote must be zero.
    k.masked_fill_(group.unwritten, 0)
    v.masked_fill_(group.unwritten, 0)
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=group.mask
    )
    return out.transpose(1, 2)
