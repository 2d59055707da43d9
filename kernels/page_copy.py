"""Copies pages from host memory into a pool, all layers at once, by the device's copy engine and without a temporary.

torch's copy_ of such strided tensors goes through pageable memory, so this calls the driver. Knows nothing of what pages hold.
"""

import ctypes
from collections.abc import Iterable

import torch

from kernels.cuda_driver import check_cuda, cuda_driver

_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_…
# CU_DEVICE_ATTRIBUTE_MAX_PITCH, the same on all devices: a 2-D copy takes no larger distance between its rows.
MAX_PITCH_BYTES = 2**31 - 1


class _Copy2d(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_type", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_void_p),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_type", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_void_p),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Copy3d(ctypes.Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = (
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_z", ctypes.c_size_t),
        ("source_lod", ctypes.c_size_t),
        ("source_type", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_void_p),
        ("source_array", ctypes.c_void_p),
        ("reserved0", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("source_height", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_z", ctypes.c_size_t),
        ("target_lod", ctypes.c_size_t),
        ("target_type", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_void_p),
        ("target_array", ctypes.c_void_p),
        ("reserved1", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("target_height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class PageCopier:
    """Copies into one pool on a CUDA device. Not for several threads at once."""

    def __init__(self, pool: torch.Tensor, max_pitch_bytes: int = MAX_PITCH_BYTES) -> None:
        """pool: [num_layers, num_pages, page_elems], contiguous."""
        assert pool.is_cuda and pool.is_contiguous(), f"a pool on {pool.device}, strides {pool.stride()}"
        num_layers, num_pages, page_elems = pool.shape
        self._pool = pool
        self._page_bytes = page_elems * pool.element_size()
        # A layer of a large pool is wider than a 2-D copy may skip. With a page as the row of a 3-D copy, no distance is.
        self._is_flat = num_pages * self._page_bytes <= max_pitch_bytes
        self._copy_2d = _Copy2d(source_type=_HOST, target_type=_DEVICE, height=num_layers)
        self._copy_2d.target_device = pool.data_ptr()
        self._copy_2d.target_pitch = num_pages * self._page_bytes
        self._copy_3d = _Copy3d(source_type=_HOST, target_type=_DEVICE, depth=num_layers, width=self._page_bytes)
        self._copy_3d.target_device = pool.data_ptr()
        self._copy_3d.target_pitch = self._copy_3d.source_pitch = self._page_bytes
        self._copy_3d.target_height = num_pages

    def start(self, source: torch.Tensor, runs: Iterable[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
        """Starts copying `length` pages from page `first` of the source on to page `page` of the pool on, for each run.

        source: [num_layers, n, page_elems] of the pool's dtype, contiguous, on the host: pinned, or the call takes as long as the
            copy does. The caller keeps it until the stream has passed this point.
        runs: (first, page, length).
        """
        assert source.is_contiguous() and source.dtype == self._pool.dtype, f"{source.dtype}, strides {source.stride()}"
        assert source.shape[::2] == self._pool.shape[::2], f"pages {tuple(source.shape)} into a pool {tuple(self._pool.shape)}"
        if self._is_flat:
            self._start_2d(source, runs, stream)
        else:
            self._start_3d(source, runs, stream)

    def _start_2d(self, source: torch.Tensor, runs: Iterable[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
        """A row is a run of pages, the next row the next layer."""
        copy, page_bytes = self._copy_2d, self._page_bytes
        copy.source_host = source.data_ptr()
        copy.source_pitch = source.shape[1] * page_bytes
        call, pointer, handle = cuda_driver().cuMemcpy2DAsync_v2, ctypes.byref(copy), ctypes.c_void_p(stream.cuda_stream)
        for first, page, length in runs:
            copy.source_x = first * page_bytes
            copy.target_x = page * page_bytes
            copy.width = length * page_bytes
            check_cuda(call(pointer, handle), "cuMemcpy2DAsync")

    def _start_3d(self, source: torch.Tensor, runs: Iterable[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
        """A row is a page, the next row the next page of the run, the next plane the next layer."""
        copy = self._copy_3d
        copy.source_host = source.data_ptr()
        copy.source_height = source.shape[1]
        call, pointer, handle = cuda_driver().cuMemcpy3DAsync_v2, ctypes.byref(copy), ctypes.c_void_p(stream.cuda_stream)
        for copy.source_y, copy.target_y, copy.height in runs:
            check_cuda(call(pointer, handle), "cuMemcpy3DAsync")
