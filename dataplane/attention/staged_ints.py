"""Small integer arrays of a step on their way to the device: one copy, to an address that never changes."""

import torch

from dataplane.model.step_inputs import Ints


class StagedInts:
    """Room for int32 arrays on the device, and two pinned stagings: one is written while the other may still be copied."""

    def __init__(self, size: int, device: torch.device) -> None:
        """size: of all arrays of one step together."""
        self.size = size
        self._on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._stagings = [torch.zeros(size, dtype=torch.int32).pin_memory() for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # torch has no type for it
        self._turn = 0

    def send(self, *arrays: Ints) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Packs the arrays side by side and starts their copy. Returns them in pinned memory and, same shapes, on the device."""
        lengths = [len(array) for array in arrays]
        total = sum(lengths)
        assert total <= self.size, f"{total} integers in a step, room for {self.size}"
        self._turn = 1 - self._turn
        staging, copied = self._stagings[self._turn][:total], self._copied[self._turn]
        copied.synchronize()  # of the copy before the last one: long done
        written, end = staging.numpy(), 0
        for array, length in zip(arrays, lengths, strict=True):
            written[end : end + length] = array
            end += length
        on_device = self._on_device[:total]
        on_device.copy_(staging, non_blocking=True)
        copied.record()
        return tuple(staging.split_with_sizes(lengths)), tuple(on_device.split_with_sizes(lengths))

    def places(self, *lengths: int) -> tuple[torch.Tensor, ...]:
        """Where arrays of these lengths will lie on the device when they are sent; the last one may be shorter then."""
        return tuple(self._on_device[: sum(lengths)].split_with_sizes(lengths))
