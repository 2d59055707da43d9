"""The LoRA operation as the model calls it: what a step plan is, and the interface that every backend implements.

Backends: `kernels.lora_torch` (reference, any device) and, on CUDA, kernels over the same row tables. Knows nothing about
requests, adapters' names or how pages are allocated: it sees rows of the pool.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray

Indices = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Where one adapter's weights of one module lie in the flat pool of a layer; the same in every layer.

    a_rows: [rank] int64, element offset of each row of A (`in_features` elements each), on the pool's device.
    b_rows: [rank] int64, element offset of each row of B transposed (`out_features` elements each), likewise.
    scaling: applied in fp32 between shrink and expand.
    """

    rank: int
    scaling: float
    a_rows: torch.Tensor
    b_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One adapter on the device: rows by module name. A module that it leaves alone is absent."""

    modules: Mapping[str, LoraRows]


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One module of a call: its rows come from `module`, its output goes to y[:, out_start : out_start + out_features]."""

    module: str
    in_features: int
    out_features: int
    out_start: int


class LoraLaunches(Enum):
    """Which kernels a plan has launched for each call of add().

    DECODE and MIXED are the same for every batch, so that a captured graph of begin() and add() computes, at each replay, the
    plan that was made last, with the same launches.
    """

    AS_NEEDED = "those that the step has work for"
    DECODE = "MBGMV alone"
    MIXED = "MBGMV and MBGMM"


class LoraPlan(ABC):
    """What a backend derived from one step's tokens and adapters; built once a step, used by every layer and module."""

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no token of the step has an adapter, so that the base-only path may be taken."""

    @abstractmethod
    def changes(self, targets: Sequence[LoraTarget]) -> bool:
        """Whether any token's adapter adds anything to the targets of one input; if not, their add() may be left out."""


class LoraOps(ABC):
    """Adds the adapter part of a linear module in place, for a batch in which every token may have another adapter."""

    @property
    def can_be_captured(self) -> bool:
        """Whether plans other than AS_NEEDED may be captured in CUDA graphs."""
        return False

    @abstractmethod
    def plan(
        self, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches = LoraLaunches.AS_NEEDED
    ) -> LoraPlan:
        """Groups a step's tokens by adapter. A plan is good until the next one is made.

        adapter_index: [num_tokens], index into `adapters`, or -1 for a token of the base model.
        """

    def begin(self, plan: LoraPlan) -> None:  # noqa: B027  (a backend may have nothing to do)
        """Prepares a step on the device: once before its first add, and at the head of a graph that captures its adds."""

    @abstractmethod
    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: LoraPlan, targets: Sequence[LoraTarget]
    ) -> None:
        """Adds scaling * (x A^T) B to y in place for all targets of one input (q, k and v; gate and up), in one call.

        Semantics: y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], nothing for index -1, sums in fp32
            (S-LoRA §5: shrink, then expand).

        y: [num_rows, out_total] dtype of the pool, written in place. Rows past the plan's tokens are padding, left alone.
        x: [num_rows, in_features] dtype of the pool.
        layer_pool: [num_pages * page_elems] one layer of the pool, flat.
        """
