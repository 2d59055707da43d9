"""Brings many small arrays to the device in one upload. Knows nothing of what they mean."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.uploads import upload

_WORD_BYTES = 8


class Upload:
    """Arrays are put in, sent once, and then found on the device under the number that `put` gave."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: list[NDArray[Any]] = []
        self._tensors: list[torch.Tensor] = []

    def put(self, values: NDArray[Any]) -> int:
        """Adds an array and returns its number. values: [n], n > 0, of a type that torch has too."""
        self._arrays.append(values)
        return len(self._arrays) - 1

    def send(self) -> None:
        """Starts the copy of all arrays, behind what the current stream has to do."""
        if not self._arrays:
            return
        # Each begins on a whole word, so that it can be viewed as whatever it is.
        ends = np.cumsum([-(-array.nbytes // _WORD_BYTES) for array in self._arrays]).tolist()
        words = np.empty(ends[-1], dtype=np.int64)
        for array, start, end in zip(self._arrays, [0, *ends], ends, strict=False):
            words[start:end].view(array.dtype)[: len(array)] = array
        on_device = torch.empty(len(words), dtype=torch.int64, device=self._device)
        upload(on_device, torch.from_numpy(words))
        for array, start, end in zip(self._arrays, [0, *ends], ends, strict=False):
            self._tensors.append(on_device[start:end].view(getattr(torch, array.dtype.name))[: len(array)])

    def __getitem__(self, number: int) -> torch.Tensor:
        """The array of that number on the device, once it was sent."""
        return self._tensors[number]
