"""Where the rank rows of adapters begin, as tables on the device that a step takes its adapters' entries from.

Each adapter is written once, when it is first seen; knows nothing of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.lora import LoraAdapter
from kernels.plan_layout import LoraLimits

# Steps' worth of adapters that are remembered.
_REMEMBERED_STEPS = 8
_NO_ROW = -1


@dataclass(frozen=True, slots=True)
class ChosenAdapters:
    """Some adapters of the tables.

    numbers: [S + modules] int64, their places in the tables; then, for each module, which of the S has rows of it.
    rank: the largest of all their modules. modules: those that one of them changes.
    """

    numbers: NDArray[np.int64]
    rank: int
    modules: frozenset[str]


class RowTables:
    """A bounded table of adapters with an entry for each module of the model."""

    def __init__(self, modules: Sequence[str], limits: LoraLimits, device: torch.device) -> None:
        self._modules = tuple(modules)
        size = _REMEMBERED_STEPS * limits.max_requests
        # [adapters, modules, A or B, rank], the first row again past an adapter's own rank; and [adapters, modules, rank].
        self._rows = torch.full((size, len(modules), 2, limits.max_rank), _NO_ROW, dtype=torch.int64, device=device)
        self._scaling = torch.zeros((size, len(modules), limits.max_rank), device=device)
        # The adapter is held, so that no other one can come to have its id while it is here.
        self._known: dict[int, tuple[LoraAdapter, int]] = {}

    def of(self, adapters: Sequence[LoraAdapter]) -> ChosenAdapters:
        """Where these adapters stand, each written if it is new."""
        assert len(adapters) <= len(self._rows), f"{len(adapters)} adapters in a step, at most {len(self._rows)}"
        if len(self._known) + sum(id(adapter) not in self._known for adapter in adapters) > len(self._rows):
            self._known.clear()
        numbers = [self._number(adapter) for adapter in adapters]
        ranks = np.array([[self._rank(adapter, name) for name in self._modules] for adapter in adapters])
        modules = frozenset(name for i, name in enumerate(self._modules) if ranks[:, i].any())
        return ChosenAdapters(np.append(numbers, ranks.argmax(axis=0)).astype(np.int64), int(ranks.max()), modules)

    def stack(self, chosen: ChosenAdapters, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [S, modules, 2, R] and scaling [S, modules, R] of the chosen ones. numbers: theirs, on the device.

        An adapter without a module has a row of another one that has it, and no scaling: such a row is finite, as whatever else
        lies in the pool may not be, and nothing comes of it.
        """
        places, donors = numbers.split_with_sizes([len(numbers) - len(self._modules), len(self._modules)])
        rows = self._rows[:, :, :, : chosen.rank].index_select(0, places)
        donated = rows[donors, torch.arange(len(self._modules), device=rows.device)]
        return torch.where(rows == _NO_ROW, donated, rows), self._scaling[:, :, : chosen.rank].index_select(0, places)

    def _rank(self, adapter: LoraAdapter, module: str) -> int:
        rows = adapter.modules.get(module)
        return rows.rank if rows is not None else 0

    def _number(self, adapter: LoraAdapter) -> int:
        held = self._known.get(id(adapter))
        if held is None:
            held = self._known[id(adapter)] = (adapter, len(self._known))
            self._write(adapter, held[1])
        return held[1]

    def _write(self, adapter: LoraAdapter, number: int) -> None:
        rows, scaling = self._rows[number], self._scaling[number]
        rows.fill_(_NO_ROW)
        scaling.zero_()
        for i, name in enumerate(self._modules):
            module = adapter.modules.get(name)
            if module is not None:
                assert module.rank <= rows.shape[2], f"{name} of rank {module.rank}, over {rows.shape[2]}"
                for side, starts in enumerate((module.a_rows, module.b_rows)):
                    rows[i, side] = starts[0]
                    rows[i, side, : module.rank] = starts
                scaling[i, : module.rank] = module.scaling
