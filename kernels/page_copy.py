"""Copies pages from host memory into a pool, all layers at once, by the device's copy engine and without a temporary.

torch's copy_ of such strided tensors goes through pageable memory, so this calls the driver. Knows nothing of what pages hold.
"""

import ctypes
from collections.abc import Iterable

import torch

from kernels.cuda_driver import check_cuda, cuda_driver

_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_…


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY3D: rows of `width` bytes, `height` of them in each of `depth` planes. x counts bytes, y rows, z planes."""

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
    """Copies into one pool on a CUDA device. Not for several threads at once.

    A page is a row of a 3-D copy and a layer its plane. As a row of a 2-D copy a layer would be simpler, but a layer of a large
    pool is wider than the 2 GiB which that may skip from row to row: it then falls apart into a copy for each row.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        """pool: [num_layers, num_pages, page_elems], contiguous."""
        assert pool.is_cuda and pool.is_contiguous(), f"a pool on {pool.device}, strides {pool.stride()}"
        num_layers, num_pages, page_elems = pool.shape
        page_bytes = page_elems * pool.element_size()
        self._pool = pool
        self._copy = _Copy(
            source_type=_HOST,
            source_pitch=page_bytes,
            target_type=_DEVICE,
            target_device=pool.data_ptr(),
            target_pitch=page_bytes,
            target_height=num_pages,
            width=page_bytes,
            depth=num_layers,
        )

    def start(self, source: torch.Tensor, runs: Iterable[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
        """Starts copying `length` pages from page `first` of the source on to page `page` of the pool on, for each run.

        source: [num_layers, n, page_elems] of the pool's dtype, contiguous, on the host: pinned, or the call takes as long as the
            copy does. The caller keeps it until the stream has passed this point.
        runs: (first, page, length).
        """
        assert source.is_contiguous() and source.dtype == self._pool.dtype, f"{source.dtype}, strides {source.stride()}"
        assert source.shape[::2] == self._pool.shape[::2], f"pages {tuple(source.shape)} into a pool {tuple(self._pool.shape)}"
        copy = self._copy
        copy.source_host = source.data_ptr()
        copy.source_height = source.shape[1]
        call, pointer, handle = cuda_driver().cuMemcpy3DAsync_v2, ctypes.byref(copy), ctypes.c_void_p(stream.cuda_stream)
        for copy.source_y, copy.target_y, copy.height in runs:
            check_cuda(call(pointer, handle), "cuMemcpy3DAsync")
