"""The LoRA operation as one padded batched product, as S-LoRA-bmm: weights are copied from the pool into stacked matrices first.

A baseline for what the kernels save: nothing here is needlessly slow but the padding and the copies that torch.bmm asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.baselines.row_tables import RowTables
from kernels.lora import Indices, LoraAdapter, LoraLaunches, LoraOps, LoraPlan, LoraTarget
from kernels.plan_layout import LoraLimits

# Rows are copied in elements of 16 bytes, at multiples of which they start, where their lengths allow it.
_WIDE = torch.complex128
# Segments of more tokens are padded apart from the others: prompts would pad every decode to their length.
MAX_SHORT_TOKENS = 128

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Segments:
    """The tokens of several adapters, grouped: those of adapters[i] are rows[starts[i]:starts[i] + counts[i]]."""

    adapters: tuple[LoraAdapter, ...]
    starts: Longs
    counts: Longs
    rows: Longs

    def choose(self, chosen: NDArray[np.bool_]) -> "_Segments":
        """Some of the adapters, with the same rows."""
        adapters = tuple(adapter for adapter, is_chosen in zip(self.adapters, chosen, strict=True) if is_chosen)
        return _Segments(adapters, self.starts[chosen], self.counts[chosen], self.rows)


@dataclass(frozen=True, slots=True)
class _PaddedBatch:
    """S adapters with at most L tokens each, all padded to L tokens and to the largest rank R.

    x_rows: [S * L], the token at each padded place; past its own tokens, an adapter has its first one again.
    y_rows, places: [T], each token once, and its padded place.
    rows: [2, modules, S, R], where the rank rows of A and of B transposed begin in the flat layer.
    scaling: [modules, S, R] of the pool's dtype, 0 past an adapter's own rank.
    modules: those that one of the adapters changes.
    """

    num_adapters: int
    x_rows: torch.Tensor
    y_rows: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    scaling: torch.Tensor
    modules: frozenset[str]


@dataclass(frozen=True, slots=True)
class BmmPlan(LoraPlan):
    """At most two padded batches: of adapters with few tokens, and of adapters with many."""

    num_tokens: int
    batches: tuple[_PaddedBatch, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no token of the step has an adapter."""
        return not self.batches

    def changes(self, targets: Sequence[LoraTarget]) -> bool:
        """Whether any token's adapter adds anything to the targets of one input."""
        return any(target.module in batch.modules for batch in self.batches for target in targets)


class BmmLoraOps(LoraOps):
    """Two torch.bmm for each module, over weights that are copied anew in every step, layer and module.

    Tokens are padded to the longest of adapters alike, not of the whole step: a prompt beside decoding requests, which the
    paper's engine computes in steps of their own, would else pad each of them to its length.
    """

    def __init__(
        self, groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype, device: torch.device, limits: LoraLimits
    ) -> None:
        targets = tuple(target for group in groups for target in group)
        self._module_of = {target.module: i for i, target in enumerate(targets)}
        self._dtype = dtype
        self._device = device
        self._tables = RowTables(tuple(self._module_of), limits, device)
        unit = _WIDE.itemsize // dtype.itemsize
        is_wide = all(t.in_features % unit == 0 and t.out_features % unit == 0 for t in targets)
        self._unit = unit if is_wide else 1

    def plan(
        self, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches = LoraLaunches.AS_NEEDED
    ) -> BmmPlan:
        """Groups a step's tokens by adapter and brings where they lie to the device, in one copy a batch.

        Shapes follow the batch, so no graph can hold this, and `launches` changes nothing.

        adapter_index: [num_tokens], index into `adapters`, or -1 for a token of the base model.
        """
        index = np.asarray(adapter_index, dtype=np.int64)
        assert not len(index) or (index.min() >= -1 and index.max() < len(adapters)), (
            f"adapter_index has {index.min()} to {index.max()}, the step {len(adapters)} adapters"
        )
        segments = _segments(index, adapters)
        is_short = segments.counts <= MAX_SHORT_TOKENS
        chosen = [segments.choose(part) for part in (is_short, ~is_short) if part.any()]
        return BmmPlan(len(index), tuple(self._pad(part) for part in chosen))

    def _pad(self, segments: _Segments) -> _PaddedBatch:
        num_adapters, longest = len(segments.counts), int(segments.counts.max())
        within = np.arange(longest)
        is_token = within < segments.counts[:, None]
        x_rows = segments.rows[segments.starts[:, None] + np.where(is_token, within, 0)].reshape(-1)
        places = np.flatnonzero(is_token)
        tables = self._tables.of(segments.adapters)
        x_rows_gpu, y_rows_gpu, places_gpu, numbers = self._upload(x_rows, x_rows[places], places, tables.numbers)
        rows, scaling = self._tables.stack(tables, numbers)
        # Once a step, small: A's and B's rows of one module lie together, and starts count wide elements.
        rows = rows.permute(2, 1, 0, 3) // self._unit
        scaling = scaling.permute(1, 0, 2).to(self._dtype)
        return _PaddedBatch(num_adapters, x_rows_gpu, y_rows_gpu, places_gpu, rows, scaling, tables.modules)

    def _upload(self, *arrays: Longs) -> Sequence[torch.Tensor]:
        """The arrays on the device, in one copy that the host does not wait for."""
        joined = torch.from_numpy(np.concatenate(arrays))
        if self._device.type == "cuda":
            joined = joined.pin_memory().to(self._device, non_blocking=True)
        return joined.split_with_sizes([len(array) for array in arrays])

    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: LoraPlan, targets: Sequence[LoraTarget]
    ) -> None:
        """Adds scaling * (x A^T) B to y in place for all targets of one input, in one call.

        Semantics: y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], nothing for index -1, sums in fp32, the
            product with A rounded to the pool's dtype.

        y: [num_rows, out_total] dtype of the pool, written in place. Rows past the plan's tokens are padding, left alone.
        x: [num_rows, in_features] dtype of the pool.
        layer_pool: [num_pages * page_elems] one layer of the pool, flat.
        """
        assert isinstance(plan, BmmPlan), f"plan of another backend: {type(plan).__name__}"
        assert len(x) == len(y) >= plan.num_tokens, f"plan of {plan.num_tokens} tokens, x has {len(x)}, y has {len(y)}"
        for batch in plan.batches:
            wanted = [target for target in targets if target.module in batch.modules]
            if not wanted:
                continue
            x_padded = x.index_select(0, batch.x_rows).view(batch.num_adapters, -1, x.shape[1])
            for target in wanted:
                module = self._module_of[target.module]
                lora_a = self._copy_rows(layer_pool, batch.rows[0, module], target.in_features)
                lora_b = self._copy_rows(layer_pool, batch.rows[1, module], target.out_features)
                shrunk = torch.bmm(x_padded, lora_a.transpose(1, 2)).mul_(batch.scaling[module].unsqueeze(1))
                delta = torch.bmm(shrunk, lora_b).view(-1, target.out_features)
                y_target = y.narrow(1, target.out_start, target.out_features)
                y_target.index_add_(0, batch.y_rows, delta.index_select(0, batch.places))

    def _copy_rows(self, layer_pool: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """The rows of `length` elements that begin at `starts` [S, R], one after the other: [S, R, length]."""
        if self._unit == 1:
            return layer_pool.unfold(0, length, 1)[starts]
        wide = layer_pool.view(_WIDE).unfold(0, length // self._unit, 1)[starts]
        return wide.view(self._dtype)


def _segments(index: Longs, adapters: Sequence[LoraAdapter]) -> _Segments:
    """The tokens of each adapter that changes something."""
    changes = np.array([bool(adapter.modules) for adapter in adapters] + [False])  # the last one is index -1
    rows = np.flatnonzero(changes[index])
    rows = rows[np.argsort(index[rows], kind="stable")]
    used, starts, counts = np.unique(index[rows], return_index=True, return_counts=True)
    return _Segments(tuple(adapters[i] for i in used.tolist()), starts, counts, rows)
