"""The four kernels of the LoRA operation, compiled for one dtype, with their block sizes, shared memory and grids.

Knows nothing of plans: it launches what it is given the addresses of.
"""

from collections.abc import Sequence

import torch

from kernels.cuda_launch import INT, LONG, POINTER, UINT, CudaLauncher, Parameter
from kernels.cuda_module import cuda_kernel
from kernels.plan_layout import MATRIX_EXPAND_COLUMNS, MATRIX_SHRINK_ROWS, MATRIX_SHRINK_TOKENS, MATRIX_STEP

# As in csrc/mbgmm.cu: the stages of shrink, and the padded rows of B that expand keeps.
_SHRINK_SHARED = 3 * (MATRIX_SHRINK_TOKENS + MATRIX_SHRINK_ROWS) * 128 * 2
_ROW_BYTES = MATRIX_EXPAND_COLUMNS * 2 + 16


class LoraKernels:
    """Launchers for the current device. Every grid fills the device once, so that it is the same for every batch."""

    def __init__(self, dtype: torch.dtype, max_rank: int) -> None:
        def load(source: str, name: str, num_threads: int, shared_bytes: int, *parameters: Parameter) -> CudaLauncher:
            return CudaLauncher(cuda_kernel(source, name, dtype), num_threads, shared_bytes, parameters)

        activations = (POINTER, LONG)  # first element and row stride
        expand_shared = -(-max_rank // MATRIX_STEP) * MATRIX_STEP * _ROW_BYTES
        self._write_tasks = load("step_plan.cu", "write_tasks", 256, 0, *(POINTER,) * 3, INT, INT, *(POINTER,) * 7, INT)
        self._vector = load("mbgmv.cu", "mbgmv", 128, 0, POINTER, *activations, *activations, *(POINTER,) * 5, UINT, INT)
        self._shrink = load("mbgmm.cu", "mbgmm_shrink", 256, _SHRINK_SHARED, POINTER, *activations, *(POINTER,) * 7)
        self._expand = load("mbgmm.cu", "mbgmm_expand", 128, expand_shared, POINTER, *activations, *(POINTER,) * 4)
        num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        # MBGMV waits for its own thread blocks: no more of them than fit at once.
        self._vector_grid = num_sms * self._vector.blocks_per_multiprocessor()
        self._shrink_grid = num_sms * self._shrink.blocks_per_multiprocessor()
        self._expand_grid = num_sms * self._expand.blocks_per_multiprocessor()
        self._plan_grid = 2 * num_sms

    def write_tasks(self, arguments: Sequence[int]) -> None:
        """Waits for everything before it."""
        self._write_tasks.launch(self._plan_grid, arguments, may_overlap=False)

    def mbgmv(self, arguments: Sequence[int], *, may_overlap: bool) -> None:
        """may_overlap: a launch that did not overlap came after the tasks were written."""
        self._vector.launch(self._vector_grid, arguments, may_overlap=may_overlap)

    def mbgmm_shrink(self, arguments: Sequence[int], *, may_overlap: bool) -> None:
        """may_overlap: as above."""
        self._shrink.launch(self._shrink_grid, arguments, may_overlap=may_overlap)

    def mbgmm_expand(self, arguments: Sequence[int]) -> None:
        """Comes after the shrink that it belongs to, with nothing between but an MBGMV that ran beside that one."""
        self._expand.launch(self._expand_grid, arguments, may_overlap=True)
