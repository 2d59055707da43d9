"""Attention over the page pool in plain torch, on any device: gathers pages and leaves the arithmetic to torch.

Knows pages and slots as numbers; nothing of requests, of what else lies in the pool, or of the model around it.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from dataplane.attention.interface import AttentionBackend, AttentionPlan
from dataplane.model.step_inputs import StepInputs

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
    """Where K and V go, and the groups of requests by sliding window, made when the first layer asks for them."""

    inputs: StepInputs
    slot_pages: torch.Tensor
    slot_offsets: torch.Tensor
    groups: dict[int | None, tuple[AttentionGroup, ...]] = field(default_factory=dict)


class TorchAttention(AttentionBackend):
    """Gathers pages and leaves the arithmetic to torch.

    Requests of equal shape share a call; a request is padded to whole pages of its own and never to another's length, so
    its sums do not depend on who else is in the batch.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens

    def plan(self, inputs: StepInputs) -> TorchAttentionPlan:
        """Prepares one step."""
        slot_pages = torch.div(inputs.slots, self._page_tokens, rounding_mode="floor")
        return TorchAttentionPlan(inputs, slot_pages, inputs.slots - slot_pages * self._page_tokens)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_pool: torch.Tensor,
        plan: AttentionPlan,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Writes k and v to their slots, then attends causally through the page tables."""
        assert isinstance(plan, TorchAttentionPlan), f"plan of another backend: {type(plan).__name__}"
        layer_pool[plan.slot_pages, 0, plan.slot_offsets] = k
        layer_pool[plan.slot_pages, 1, plan.slot_offsets] = v
        if sliding_window not in plan.groups:
            plan.groups[sliding_window] = self._groups(plan.inputs, sliding_window)
        out = torch.empty_like(q)
        for group in plan.groups[sliding_window]:
            out[group.rows] = _attend(q[group.rows], layer_pool, group)
        return out

    def _groups(self, inputs: StepInputs, sliding_window: int | None) -> tuple[AttentionGroup, ...]:
        """Requests by (query rows, pages read), cut so that no group gathers more than MAX_GATHERED_TOKENS."""
        members: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for r, context_len in enumerate(inputs.context_lens):
            num_rows = inputs.query_starts[r + 1] - inputs.query_starts[r]
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
                groups.append(self._group(inputs, chunk, num_rows, num_pages, sliding_window))
        return tuple(groups)

    def _group(
        self, inputs: StepInputs, requests: list[tuple[int, int]], num_rows: int, num_pages: int, sliding_window: int | None
    ) -> AttentionGroup:
        """One group of (request, first page read) pairs."""
        device = inputs.slots.device
        num_keys = num_pages * self._page_tokens
        meta = [(inputs.query_starts[r], inputs.context_lens[r], first * self._page_tokens) for r, first in requests]
        first_row, context_len, first_key = torch.tensor(meta, dtype=torch.int64, device=device).T[:, :, None]
        tables = [inputs.page_tables[r][first : first + num_pages] for r, first in requests]
        steps = torch.arange(num_rows, device=device)
        queries = (context_len - num_rows + steps)[:, :, None]
        keys = (first_key + torch.arange(num_keys, device=device))[:, None, :]
        mask = keys <= queries
        if sliding_window is not None:
            mask &= keys > queries - sliding_window
        return AttentionGroup(
            rows=first_row + steps,
            page_tables=torch.tensor(tables, dtype=torch.int64, device=device),
            mask=mask[:, None],
            unwritten=(keys[:, 0] >= context_len)[:, :, None, None],
        )


def _attend(q: torch.Tensor, layer_pool: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
    """Attention of one group: q [G, n, num_heads, head_dim] to the same shape."""
    k, v = (layer_pool[group.page_tables, side].flatten(1, 2) for side in (0, 1))
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
