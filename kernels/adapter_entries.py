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
        # Rows by the adapters' ids. They are held, so that no other one can come to have the id of one whose entries are here.
        self._rows: dict[int, int] = {}
        self._held: list[LoraAdapter] = []

    def of(self, adapters: Sequence[LoraAdapter]) -> NDArray[np.void]:
        """The adapters' entries, [len(adapters), targets]. A module that an adapter leaves alone has rank 0."""
        assert len(adapters) <= self._max_adapters, f"{len(adapters)} adapters in a step, at most {self._max_adapters}"
        # A hundred look-ups in every step, so nothing else.
        rows = list(map(self._rows.get, map(id, adapters)))
        if None in rows:
            self._add(adapters)
            rows = list(map(self._rows.get, map(id, adapters)))
        return self._entries.take(np.array(rows, dtype=np.int64), axis=0)

    def _add(self, adapters: Sequence[LoraAdapter]) -> None:
        """Writes the entries of those that are new; forgets all others if there is no room."""
        new = {id(adapter): adapter for adapter in adapters if id(adapter) not in self._rows}
        if len(self._held) + len(new) > len(self._entries):
            self._rows.clear()
            self._held.clear()
            new = {id(adapter): adapter for adapter in adapters}
        for key, adapter in new.items():
            self._write(adapter, len(self._held))
            self._rows[key] = len(self._held)
            self._held.append(adapter)

    def _write(self, adapter: LoraAdapter, row: int) -> None:
        entries = self._entries[row]
        entries[:] = 0
        for i, target in enumerate(self._targets):
            rows = adapter.modules.get(target.module)
            if rows is not None:
                assert 0 < rows.rank <= self._max_rank, f"{target.module} of rank {rows.rank}, not within 1 to {self._max_rank}"
                entries[i] = (rows.a_rows.data_ptr(), rows.b_rows.data_ptr(), rows.rank, rows.scaling)
