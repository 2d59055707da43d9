"""The torch reference of the LoRA operation, which is also the CPU backend: one adapter after the other, on any device.

Knows nothing about how rows are packed: it reads them where the row tables say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.lora import Indices, LoraAdapter, LoraLaunches, LoraOps, LoraPlan, LoraRows, LoraTarget


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """The tokens of one adapter. rows: [n] int64, ascending, on the device of the adapter's row tables."""

    rows: torch.Tensor
    adapter: LoraAdapter


@dataclass(frozen=True, slots=True)
class TorchLoraPlan(LoraPlan):
    """A segment for each adapter that has tokens in the step and changes at least one module."""

    num_tokens: int
    segments: tuple[LoraSegment, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no token of the step has an adapter."""
        return not self.segments

    def changes(self, targets: Sequence[LoraTarget]) -> bool:
        """Whether any token's adapter adds anything to the targets of one input."""
        return any(target.module in segment.adapter.modules for segment in self.segments for target in targets)


class TorchLoraOps(LoraOps):
    """Gathers each adapter's rank rows from the pool and multiplies in fp32; tokens with index -1 are never touched."""

    def plan(
        self, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches = LoraLaunches.AS_NEEDED
    ) -> TorchLoraPlan:
        """Groups a step's tokens by adapter. Nothing here can be captured in a graph, so `launches` changes nothing.

        adapter_index: [num_tokens], index into `adapters`, or -1 for a token of the base model.
        """
        # A Python loop over tokens, once a step and not once a layer; the reference need not be faster.
        rows_of: dict[int, list[int]] = {}
        for row, index in enumerate(np.asarray(adapter_index).tolist()):
            assert -1 <= index < len(adapters), f"adapter_index[{row}] = {index}, but the step has {len(adapters)} adapters"
            if index >= 0:
                rows_of.setdefault(index, []).append(row)
        segments = []
        for index, rows in rows_of.items():
            modules = adapters[index].modules
            if modules:
                device = next(iter(modules.values())).a_rows.device
                segments.append(LoraSegment(torch.tensor(rows, dtype=torch.int64, device=device), adapters[index]))
        return TorchLoraPlan(len(adapter_index), tuple(segments))

    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: LoraPlan, targets: Sequence[LoraTarget]
    ) -> None:
        """Adds scaling * (x A^T) B to y in place for all targets of one input, in one call.

        Semantics: y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], nothing for index -1, sums in fp32.

        y: [num_rows, out_total] dtype of the pool, written in place. Rows past the plan's tokens are padding, left alone.
        x: [num_rows, in_features] dtype of the pool.
        layer_pool: [num_pages * page_elems] one layer of the pool, flat.
        """
        assert isinstance(plan, TorchLoraPlan), f"plan of another backend: {type(plan).__name__}"
        assert len(x) == len(y) >= plan.num_tokens, f"plan of {plan.num_tokens} tokens, x has {len(x)}, y has {len(y)}"
        for segment in plan.segments:
            wanted = [(t, segment.adapter.modules[t.module]) for t in targets if t.module in segment.adapter.modules]
            if not wanted:
                continue
            x_segment = x.index_select(0, segment.rows).float()
            for target, rows in wanted:
                y_target = y.narrow(1, target.out_start, target.out_features)
                total = y_target.index_select(0, segment.rows).float() + _delta(x_segment, layer_pool, target, rows)
                y_target.index_copy_(0, segment.rows, total.to(y.dtype))


def _delta(x: torch.Tensor, layer_pool: torch.Tensor, target: LoraTarget, rows: LoraRows) -> torch.Tensor:
    """scaling * (x A^T) B of one adapter and module, [n, out_features] fp32, for x [n, in_features] fp32."""
    lora_a = _gather_rows(layer_pool, rows.a_rows, target.in_features)
    lora_b = _gather_rows(layer_pool, rows.b_rows, target.out_features)
    return ((x @ lora_a.T) * rows.scaling) @ lora_b


def _gather_rows(layer_pool: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """The rows of `length` elements that begin at `starts`, [len(starts), length] fp32."""
    # A row may begin at any element: seen through an overlapping view, its start is its index.
    return layer_pool.unfold(0, length, 1)[starts].float()
