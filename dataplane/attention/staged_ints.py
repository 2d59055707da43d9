"""Small integer arrays of a step on their way to the device: one copy, to an address that never changes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dataplane.model.step_inputs import Ints
from kernels.stagings import Stagings

Tensors = tuple[torch.Tensor, ...]


class StagedInts:
    """Room for int32 arrays on the device, and the stagings that they come from."""

    def __init__(self, size: int, device: torch.device) -> None:
        """size: of all arrays of one step together."""
        self.size = size
        self._on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._stagings = Stagings(size, torch.int32, device)

    @contextmanager
    def sent(self, *arrays: Ints) -> Iterator[tuple[Tensors, Tensors]]:
        """Packs the arrays side by side and starts their copy. Gives them in the staging, which more copies may be made of before
        this is left, and in the same shapes on the device."""
        lengths = [len(array) for array in arrays]
        total = sum(lengths)
        assert total <= self.size, f"{total} integers in a step, room for {self.size}"
        with self._stagings.next() as whole:
            staging, on_device = whole[:total], self._on_device[:total]
            np.concatenate(arrays, out=staging.numpy())
            on_device.copy_(staging, non_blocking=True)
            yield tuple(staging.split_with_sizes(lengths)), tuple(on_device.split_with_sizes(lengths))

    def places(self, *lengths: int) -> Tensors:
        """Where arrays of these lengths will lie on the device when they are sent; the last one may be shorter then."""
        return tuple(self._on_device[: sum(lengths)].split_with_sizes(lengths))
