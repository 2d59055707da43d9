"""What the kernels must know of each adapter, as arrays: read from its row tables once, however many steps it takes part in."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.lora import LoraAdapter, LoraTarget
from kernels.plan_layout import ENTRY

# Steps' worth of adapters that are remembered.
_REMEMBERED_STEPS = 8


class AdapterEntries:
    """A bounded table of adapters, with an entry for each target of the model."""

    def __init__(self, targets: Sequence[LoraTarget], max_adapters: int, max_rank: int) -> None:
        """max_adapters: of one step."""
        self._targets = tuple(targets)
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._entries = np.zeros((_REMEMBERED_STEPS * max_adapters, len(self._targets)), dtype=ENTRY)
        # The adapter is held, so that no other one can come to have its id while its entries are here.
        self._known: dict[int, tuple[LoraAdapter, int]] = {}

    def of(self, adapters: Sequence[LoraAdapter]) -> NDArray[np.void]:
        """The adapters' entries, [len(adapters), targets]. A module that an adapter leaves alone has rank 0."""
        assert len(adapters) <= self._max_adapters, f"{len(adapters)} adapters in a step, at most {self._max_adapters}"
        rows = self._rows(adapters)
        if rows is None:
            self._known.clear()
            rows = self._rows(adapters)
            assert rows is not None
        return self._entries[rows]

    def _rows(self, adapters: Sequence[LoraAdapter]) -> list[int] | None:
        """Where the adapters' entries lie; None if the table is full."""
        rows = []
        for adapter in adapters:
            held = self._known.get(id(adapter))
            if held is None:
                if len(self._known) == len(self._entries):
                    return None
                held = self._known[id(adapter)] = (adapter, self._write(adapter, len(self._known)))
            rows.append(held[1])
        return rows

    def _write(self, adapter: LoraAdapter, row: int) -> int:
        entries = self._entries[row]
        entries[:] = 0
        for i, target in enumerate(self._targets):
            rows = adapter.modules.get(target.module)
            if rows is not None:
                assert 0 < rows.rank <= self._max_rank, f"{target.module} of rank {rows.rank}, not within 1 to {self._max_rank}"
                entries[i] = (rows.a_rows.data_ptr(), rows.b_rows.data_ptr(), rows.rank, rows.scaling)
        return row
