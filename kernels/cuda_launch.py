"""Launches kernels that may start while the launch before them still runs (programmatic dependent launch).

CuPy's own launch cannot ask for that, so this calls the driver. Knows nothing of what the kernels compute.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from kernels.cuda_driver import check_cuda, cuda_driver

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…
_VALUE_BYTES = 64
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

# Types of a kernel's parameters.
UINT, LONG, POINTER, INT = ctypes.c_uint, ctypes.c_longlong, ctypes.c_void_p, ctypes.c_int
Parameter = type[ctypes.c_uint] | type[ctypes.c_longlong] | type[ctypes.c_void_p] | type[ctypes.c_int]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * (_VALUE_BYTES - 4)),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class CudaLauncher:
    """One kernel with its block size and shared memory, launched on torch's current stream. Not for several threads at once."""

    def __init__(self, kernel: Any, num_threads: int, shared_bytes: int, parameters: Sequence[Parameter]) -> None:
        """kernel: CuPy's. parameters: the type of each of its parameters, in order. The kernel's device is the current one."""
        self._kernel = kernel  # keeps the module loaded
        self._function = ctypes.c_void_p(kernel.ptr)
        self._num_threads = num_threads
        self._shared_bytes = shared_bytes
        self._device = torch.cuda.current_device()
        self._values = [parameter() for parameter in parameters]
        self._pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(value) for value in self._values))
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(shared_bytes=shared_bytes, attributes=ctypes.pointer(self._attribute))
        self._config.block[:] = (num_threads, 1, 1)
        self._config.grid[:] = (1, 1, 1)
        self._config_pointer = ctypes.byref(self._config)
        self._launch = cuda_driver().cuLaunchKernelEx
        self._can_overlap = torch.cuda.get_device_capability() >= (9, 0)
        self._allow_shared_memory()

    def blocks_per_multiprocessor(self) -> int:
        """How many thread blocks of this kernel one multiprocessor holds at once."""
        found = ctypes.c_int()
        result = cuda_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(found), self._function, self._num_threads, ctypes.c_size_t(self._shared_bytes)
        )
        check_cuda(result, "cuOccupancyMaxActiveBlocksPerMultiprocessor")
        return found.value

    def launch(self, num_blocks: int, arguments: Sequence[int], *, may_overlap: bool) -> None:
        """may_overlap: the kernel waits by itself for the launch before it, so it may start before that one has finished."""
        for value, argument in zip(self._values, arguments, strict=True):
            value.value = argument
        config = self._config
        config.grid[0] = num_blocks
        config.stream = torch.cuda.current_stream(self._device).cuda_stream
        config.num_attributes = 1 if may_overlap and self._can_overlap else 0
        result = self._launch(self._config_pointer, self._function, self._pointers, None)
        if result:
            check_cuda(result, "cuLaunchKernelEx")

    def _allow_shared_memory(self) -> None:
        # The limit belongs to the kernel, which others may launch with more: it is only ever raised.
        held = ctypes.c_int()
        check_cuda(
            cuda_driver().cuFuncGetAttribute(ctypes.byref(held), _MAX_DYNAMIC_SHARED, self._function), "cuFuncGetAttribute"
        )
        if held.value < self._shared_bytes:
            result = cuda_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, self._shared_bytes)
            check_cuda(result, f"cuFuncSetAttribute for {self._shared_bytes} bytes of shared memory")
