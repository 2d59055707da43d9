"""A growing array of 32-bit integers: a list to append to, an array to compute with. Knows nothing of what it counts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MIN_CAPACITY = 16


class IntArray:
    """Appends are amortized; `view` is the values so far without a copy, good until the next append."""

    __slots__ = ("_length", "_values")

    def __init__(self, values: Sequence[int] = ()) -> None:
        self._length = len(values)
        self._values = np.empty(max(_MIN_CAPACITY, 2 * len(values)), dtype=np.int32)
        self._values[: self._length] = values

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> NDArray[np.int32]:
        """The values, [len]."""
        return self._values[: self._length]

    def append(self, value: int) -> None:
        """Adds one value."""
        self._reserve(1)
        self._values[self._length] = value
        self._length += 1

    def extend(self, values: Sequence[int]) -> None:
        """Adds values."""
        self._reserve(len(values))
        self._values[self._length : self._length + len(values)] = values
        self._length += len(values)

    def _reserve(self, num_more: int) -> None:
        if self._length + num_more > len(self._values):
            grown = np.empty(2 * (self._length + num_more), dtype=np.int32)
            grown[: self._length] = self.view
            self._values = grown
