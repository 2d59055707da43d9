"""FlashInfer's wrappers for the layers of one sliding window: how they are made and planned, and the memory they share.

Knows nothing of steps: it is given page tables in FlashInfer's own form.
"""

from typing import Any

import torch

from dataplane.attention.interface import AttentionShape

# Query heads per KV head for which the kernels without tensor cores exist and read K and V at least as fast.
_CUDA_CORE_GROUPS = (1, 2)
# What FlashInfer itself gives each wrapper for the plan that its kernels read.
_PLAN_BYTES = 8 << 20
# Of a split call: query rows of a tile at most, and tiles that share a multiprocessor.
_MAX_TILE_ROWS = 128
_TILES_PER_PROCESSOR = 2
_MIN_WORKSPACE_BYTES = 64 << 20
_ALIGNMENT_BYTES = 1 << 20
# Of a captured decode: rows of its tiles, by the most query heads that share a KV head.
_DECODE_TILES = ((16, 16), (64, 64), (128, 1 << 30))


class PlanMemory:
    """Where plans of wrappers lie of which only one lives at a time, on the device and on the host.

    FlashInfer gives each wrapper page-locked memory of its own, whose copy waits for all that are being loaded, and the next
    plan for that copy. From ordinary memory a plan is read when it is made, see `kernels.uploads`; those of most steps are small
    enough for that, and a larger one is late but right.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)
        self._on_host = torch.empty(_PLAN_BYTES, dtype=torch.uint8)

    def lend(self, wrapper: Any) -> None:
        """Before the wrapper's first plan. FlashInfer's own setter would allocate for the host, hence its fields."""
        wrapper._int_workspace_buffer = self._on_device
        wrapper._pin_memory_int_workspace_buffer = self._on_host


class Workspace:
    """Where split calls leave what is to be merged, fp32. All wrappers share it, as their calls follow one another."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._shape = shape
        self._num_tiles = _TILES_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
        # A step that is not captured splits no further than its tiles fill the device once, each at its largest.
        num_rows = shape.num_heads // shape.num_kv_heads * self._num_tiles * _MAX_TILE_ROWS
        self.memory = torch.zeros(max(_MIN_WORKSPACE_BYTES, self._num_bytes(num_rows)), dtype=torch.uint8, device=device)

    def reserve(self, max_rows: int) -> None:
        """Makes room for captured decodes of that many rows, for wrappers made from here on.

        FlashInfer gives each tile that such a step might have a place (scheduler.cuh, PrefillSplitQOKVIndptr).
        """
        group = self._shape.num_heads // self._shape.num_kv_heads
        tile_rows = next(rows for rows, largest in _DECODE_TILES if group <= largest)
        num_tiles = max(-(-max_rows * group // tile_rows) + max_rows - 1, self._num_tiles // self._shape.num_kv_heads)
        size_bytes = self._num_bytes(num_tiles * tile_rows * self._shape.num_heads)
        if size_bytes > len(self.memory):
            self.memory = torch.zeros(size_bytes, dtype=torch.uint8, device=self.memory.device)

    def _num_bytes(self, num_rows: int) -> int:
        """Of partial outputs of one head each, with their sums."""
        return num_rows * (self._shape.head_dim + 1) * 4 + _ALIGNMENT_BYTES


class WindowWrappers:
    """Makes and plans the wrappers for the layers of one sliding window."""

    def __init__(
        self, flashinfer: Any, shape: AttentionShape, dtype: torch.dtype, window: int | None, workspace: Workspace
    ) -> None:
        self.device = workspace.memory.device
        self._flashinfer = flashinfer
        self._workspace = workspace
        self._use_tensor_cores = shape.num_heads // shape.num_kv_heads not in _CUDA_CORE_GROUPS
        self._shape = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_tokens)
        # FlashInfer counts the tokens before the query's own.
        self._options = {"window_left": -1 if window is None else window - 1, "q_data_type": dtype, "kv_data_type": dtype}
        self._decode_memory = PlanMemory(self.device)
        self._prefill_memory = PlanMemory(self.device)

    def decode(self, places: tuple[torch.Tensor, ...] | None = None) -> Any:
        """A wrapper for requests of one row each, its kernels loaded.

        places: for one whose launches never change, where indptr [P + 1], last_page_lens [P] and indices will lie.
        """
        options: dict[str, object] = {"use_tensor_cores": self._use_tensor_cores}
        num_requests = 1
        if places is not None:
            names = ("paged_kv_indptr_buffer", "paged_kv_last_page_len_buffer", "paged_kv_indices_buffer")
            options |= {"use_cuda_graph": True, **dict(zip(names, places, strict=True))}
            num_requests = len(places[1])
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace.memory, "NHD", **options)
        self._decode_memory.lend(wrapper)
        steps = torch.arange(num_requests + 1, dtype=torch.int32)
        # In full once, on pages that nobody reads; `plan_decode` relies on what it finds out.
        wrapper.plan(steps, steps[:-1], torch.ones_like(steps[:-1]), *self._shape, **self._options)
        return wrapper

    def prefill(self) -> Any:
        """A wrapper for requests of any number of rows."""
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace.memory, "NHD")
        self._prefill_memory.lend(wrapper)
        return wrapper

    def plan_decode(self, wrapper: Any, indptr: torch.Tensor, last_page_lens: torch.Tensor, indices: torch.Tensor) -> None:
        """Plans a step from arrays on the host; those on the device are the caller's to copy, or to set."""
        self._flashinfer.fast_decode_plan(
            wrapper, indptr, indices, last_page_lens, *self._shape, **self._options, global_override_indptr_cpu=indptr
        )

    def plan_prefill(
        self, wrapper: Any, query_starts: torch.Tensor, indptr: torch.Tensor, last_page_lens: torch.Tensor, indices: torch.Tensor
    ) -> None:
        """Plans a step from arrays on the host, except `indices`, which are on the device."""
        wrapper.plan(query_starts, indptr, indices, last_page_lens, *self._shape, causal=True, **self._options)
