"""Small integer arrays of a step on their way to the device: one upload, to an address that never changes."""

import numpy as np
import torch

from dataplane.model.step_inputs import Ints
from kernels.uploads import upload

Tensors = tuple[torch.Tensor, ...]


class PackedInts:
    """Room for int32 arrays, on the device and side by side on the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        """size: of all arrays of one step together."""
        self.size = size
        self._on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(size, dtype=torch.int32)

    def send(self, *arrays: Ints) -> tuple[Tensors, Tensors]:
        """Packs the arrays side by side and starts their copy. Gives them on the host and on the device, until more are sent."""
        lengths = [len(array) for array in arrays]
        total = sum(lengths)
        assert total <= self.size, f"{total} integers in a step, room for {self.size}"
        on_host, on_device = self._on_host[:total], self._on_device[:total]
        np.concatenate(arrays, out=on_host.numpy())
        upload(on_device, on_host)
        return tuple(on_host.split_with_sizes(lengths)), tuple(on_device.split_with_sizes(lengths))

    def places(self, *lengths: int) -> Tensors:
        """Where arrays of these lengths will lie on the device when they are sent; the last one may be shorter then."""
        return tuple(self._on_device[: sum(lengths)].split_with_sizes(lengths))
