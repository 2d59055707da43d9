"""One piece of host memory, allocated and page-locked once, and the buffers that are cut from it.

Page-locking takes the driver's locks for milliseconds, which would stop the launches of a device at work: so it is done at the
start, for all. Knows nothing of what lies in the buffers.
"""

import mmap
import weakref
from bisect import insort
from collections import deque
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_store.errors import HostMemoryError

# Buffers start at multiples of this: more than any copy or vector asks for.
ALIGN_BYTES = 512

_CUDA_SUCCESS = 0


class HostArena:
    """Buffers under a bound of bytes that is the memory itself.

    Its owner serializes the calls; a buffer may be dropped in any thread.
    """

    def __init__(self, capacity_bytes: int, pin_memory: bool) -> None:
        """pin_memory: page-locked for CUDA, which takes part of a second per GiB; else pages are taken as they are first written.

        Raises:
            HostMemoryError: there is not so much memory, or not so much can be page-locked.
        """
        self._capacity_bytes = capacity_bytes
        self._memory = _map(capacity_bytes)
        if pin_memory:
            _pin(self._memory)
        # (start, size), sorted; no two touch.
        self._free: list[tuple[int, int]] = [(0, capacity_bytes)]
        # Buffers that nobody holds any more. They get here in any thread and at any moment, so it is all that may happen there.
        self._dropped: deque[tuple[int, int]] = deque()
        self._num_buffers = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of no buffer, in however many pieces."""
        self._collect()
        return sum(size for _, size in self._free)

    def allocate(self, size_bytes: int) -> torch.Tensor | None:
        """A buffer, [size_bytes] uint8, from the smallest free piece that holds it; None if there is none.

        It is free again once no tensor and no view of it is left.
        """
        self._collect()
        fitting = [(length, start) for start, length in self._free if length >= size_bytes]
        if not fitting:
            return None
        length, start = min(fitting)
        size = min(-(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES, length)  # the last piece may end off the grid
        self._free.remove((start, length))
        if size < length:
            insort(self._free, (start + size, length - size))
        self._num_buffers += 1
        buffer = self._memory[start : start + size_bytes]
        finalizer = weakref.finalize(buffer, self._dropped.append, (start, size))
        finalizer.atexit = False  # the memory goes with the process
        return torch.from_numpy(buffer)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        offset: int = tensor.data_ptr() - self._memory.ctypes.data
        return 0 <= offset < self._capacity_bytes

    def check_integrity(self) -> None:
        """Asserts that free pieces lie apart, within the memory, and are all of it when there is no buffer."""
        self._collect()
        end = -1
        for start, size in self._free:
            assert size > 0 and start > end, f"free pieces {self._free} overlap or touch"
            end = start + size
        assert end <= self._capacity_bytes, f"a free piece ends at {end} of {self._capacity_bytes}"
        is_whole = self._free == [(0, self._capacity_bytes)]
        assert is_whole == (self._num_buffers == 0), f"{self._num_buffers} buffers beside free pieces {self._free}"

    def _collect(self) -> None:
        """Takes back what was dropped."""
        while self._dropped:
            piece = self._dropped.popleft()
            insort(self._free, piece)
            self._merge(self._free.index(piece))
            self._num_buffers -= 1

    def _merge(self, i: int) -> None:
        """Joins free piece i with those that it touches."""
        for left in (i, i - 1):
            if left >= 0 and left + 1 < len(self._free):
                (start, size), (next_start, next_size) = self._free[left : left + 2]
                if start + size == next_start:
                    self._free[left : left + 2] = [(start, size + next_size)]


def _map(size_bytes: int) -> NDArray[np.uint8]:
    """Memory of the system's own, which takes none of it until it is written."""
    try:
        mapped = mmap.mmap(-1, size_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise HostMemoryError(size_bytes, f"cannot be had ({error})") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Page-locked several times as fast: there are 512 times fewer pages. A kernel without them refuses, which is no harm.
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, dtype=np.uint8)


def _pin(memory: NDArray[np.uint8]) -> None:
    """Page-locks the memory until nobody has a view of it."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    address = memory.ctypes.data
    result = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if result != _CUDA_SUCCESS:
        raise HostMemoryError(memory.nbytes, f"cannot be page-locked ({cudart.cudaGetErrorString(cudart.cudaError(result))})")
    # Before the memory is given back, or its address would stay registered for whatever comes to lie there.
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
