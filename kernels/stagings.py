"""Host memory that a step is written to, for copies to the device to read. Knows nothing of what is copied."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stagings:
    """Two buffers in turn, pinned where there is a CUDA device: the next step is written while the copies of this one may not
    have run yet."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """size: elements of each."""
        is_cuda = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=dtype, pin_memory=is_cuda) for _ in range(2)]
        self._read = [torch.cuda.Event() if is_cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]  # torch has no type for it
        self._turn = 0

    @contextmanager
    def next(self) -> Iterator[torch.Tensor]:
        """The buffer that was written longer ago. All that reads it is launched on the current stream before this is left."""
        self._turn = 1 - self._turn
        read = self._read[self._turn]
        if read is not None:
            read.synchronize()  # by the step before the last one: long done
        yield self._buffers[self._turn]
        if read is not None:
            read.record()
