"""Attention over the page pool with FlashInfer's kernels, which read K and V from strided views of the pool itself.

Knows pages and slots as numbers, like the interface it implements; whether FlashInfer can serve a model is decided elsewhere.
"""

import importlib
import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch

from dataplane.attention.interface import AttentionBackend, AttentionPlan, AttentionShape
from dataplane.model.step_inputs import StepInputs

# Query heads per KV head for which the kernels without tensor cores exist and read K and V at least as fast.
_CUDA_CORE_GROUPS = (1, 2)
# Of a split call: query rows of a tile at most, and tiles that share a multiprocessor.
_MAX_TILE_ROWS = 128
_TILES_PER_PROCESSOR = 2
_MIN_WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class FlashInferPlan(AttentionPlan):
    """Where K and V go, and how many leading rows decode. FlashInfer's own plans live in its wrappers until the next step's.

    rows: [T + 1] int32, 0, 1, 2, ...
    slot_pages, slot_offsets: [T] int32, page of each token and its place there.
    """

    rows: torch.Tensor
    slot_pages: torch.Tensor
    slot_offsets: torch.Tensor
    num_decode_rows: int


class FlashInferAttention(AttentionBackend):
    """One decode call for the requests of one row that lead the step, one prefill call for all others.

    `plan` does all that a host must do and leaves what kernels read in buffers of this object and of FlashInfer's wrappers; `run`
    only launches. A captured decode step therefore needs no more than wrappers made for CUDA graphs. One plan lives at a time.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        """Compiles the kernels, or loads them where this machine has compiled them before."""
        self._shape = shape
        self._flashinfer = _import_flashinfer()
        workspace = torch.empty(_workspace_bytes(shape, device), dtype=torch.uint8, device=device)
        self._calls = {window: _WindowCalls(self._flashinfer, shape, dtype, window, workspace) for window in shape.windows}
        # Grown to the largest step seen; rows, pages and offsets of its slots.
        self._slots = torch.empty((3, 0), dtype=torch.int32, device=device)
        self._current: FlashInferPlan | None = None
        self._warm(dtype, device)

    def plan(self, inputs: StepInputs) -> FlashInferPlan:
        """Prepares one step. Ends what was planned before."""
        num_decode = _num_leading_decodes(inputs.query_starts)
        for window, calls in self._calls.items():
            calls.plan(_read_pages(inputs, self._shape.page_tokens, window), inputs.query_starts, num_decode)
        num_tokens = len(inputs.slots)
        if num_tokens >= self._slots.shape[1]:
            self._slots = torch.empty((3, num_tokens + 1), dtype=torch.int32, device=inputs.slots.device)
            self._slots[0] = torch.arange(num_tokens + 1)
        rows, pages, offsets = self._slots
        pages[:num_tokens] = inputs.slots // self._shape.page_tokens
        offsets[:num_tokens] = inputs.slots % self._shape.page_tokens
        self._current = FlashInferPlan(rows[: num_tokens + 1], pages[:num_tokens], offsets[:num_tokens], num_decode)
        return self._current

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_pool: torch.Tensor,
        plan: AttentionPlan,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Writes k and v to their slots, then attends causally through the page tables."""
        assert plan is self._current, "a plan is good until the next one is made"
        kv_pages = (layer_pool[:, 0], layer_pool[:, 1])
        # FlashInfer appends at positions of requests; here each token is a request that has one page, the one of its slot.
        self._flashinfer.append_paged_kv_cache(
            k,
            v,
            self._current.rows[:-1],
            self._current.slot_offsets,
            kv_pages,
            self._current.slot_pages,
            self._current.rows,
            self._current.rows[:-1],  # lengths of last pages: only their number is looked at
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._calls[sliding_window].run(q, kv_pages, out, self._current.num_decode_rows)
        return out

    def _warm(self, dtype: torch.dtype, device: torch.device) -> None:
        """Runs both calls once on a pool of one page: a step must not wait for a compiler."""
        shape = self._shape
        pool = torch.zeros((1, 2, shape.page_tokens, shape.num_kv_heads, shape.head_dim), dtype=dtype, device=device)
        tokens = torch.zeros(3, dtype=torch.int64, device=device)
        inputs = StepInputs(tokens, tokens, tokens, (0, 1, 3), (1, 2), ((0,), (0,)), tokens, (-1, -1, -1), ())
        q = torch.zeros((3, shape.num_heads, shape.head_dim), dtype=dtype, device=device)
        k = torch.zeros((3, shape.num_kv_heads, shape.head_dim), dtype=dtype, device=device)
        plan = self.plan(inputs)
        for window in shape.windows:
            self.run(q, k, k, pool, plan, window)
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class _ReadPages:
    """The pages that each request's rows attend to, on the host in pinned memory, int32.

    indptr: [R + 1]; pages of request r are indices[indptr[r]:indptr[r + 1]].
    last_page_lens: [R] tokens in the last page of each.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_lens: torch.Tensor


class _WindowCalls:
    """FlashInfer's wrappers for the layers of one sliding window, and what was planned for them."""

    def __init__(
        self, flashinfer: Any, shape: AttentionShape, dtype: torch.dtype, window: int | None, workspace: torch.Tensor
    ) -> None:
        use_tensor_cores = shape.num_heads // shape.num_kv_heads not in _CUDA_CORE_GROUPS
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=use_tensor_cores)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._page_tokens = shape.page_tokens
        # FlashInfer counts the tokens before the query's own.
        self._options = {"window_left": -1 if window is None else window - 1, "q_data_type": dtype, "kv_data_type": dtype}
        # Recorded behind the copies of a plan, whose sources in pinned memory the next plan overwrites.
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no type for it

    def plan(self, pages: _ReadPages, query_starts: tuple[int, ...], num_decode: int) -> None:
        """Prepares the calls of one step whose first `num_decode` requests have one row each."""
        self._copied.synchronize()
        if num_decode:
            self._decode.plan(
                pages.indptr[: num_decode + 1],
                pages.indices[: int(pages.indptr[num_decode])],
                pages.last_page_lens[:num_decode],
                *self._heads,
                self._page_tokens,
                **self._options,
            )
        if query_starts[-1] > num_decode:
            self._prefill.plan(
                torch.tensor(query_starts[num_decode:], dtype=torch.int32) - num_decode,
                pages.indptr[num_decode:] - pages.indptr[num_decode],
                pages.indices[int(pages.indptr[num_decode]) :],
                pages.last_page_lens[num_decode:],
                *self._heads,
                self._page_tokens,
                causal=True,
                **self._options,
            )
        self._copied.record()

    def run(self, q: torch.Tensor, kv_pages: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, num_decode: int) -> None:
        """Attends as planned; row by row of q into out."""
        if num_decode:
            self._decode.run(q[:num_decode], kv_pages, out=out[:num_decode])
        if len(q) > num_decode:
            self._prefill.run(q[num_decode:], kv_pages, out=out[num_decode:])


def _num_leading_decodes(query_starts: tuple[int, ...]) -> int:
    """How many requests from the first on have one row; that is also how many rows they have together."""
    num_decode = 0
    while num_decode + 1 < len(query_starts) and query_starts[num_decode + 1] == num_decode + 1:
        num_decode += 1
    return num_decode


def _read_pages(inputs: StepInputs, page_tokens: int, window: int | None) -> _ReadPages:
    """Page tables without the pages that lie before every row's window; masks count from a request's end, so nothing shifts."""
    tables, indptr, last_page_lens = [], [0], []
    for r, context_len in enumerate(inputs.context_lens):
        first = 0
        if window is not None:
            num_rows = inputs.query_starts[r + 1] - inputs.query_starts[r]
            first = max(0, context_len - num_rows - window + 1) // page_tokens
        table = inputs.page_tables[r][first : -(-context_len // page_tokens)]
        tables.append(table)
        indptr.append(indptr[-1] + len(table))
        last_page_lens.append((context_len - 1) % page_tokens + 1)
    values = numpy.fromiter(chain(indptr, last_page_lens, *tables), dtype=numpy.int32)
    host = torch.from_numpy(values).pin_memory()
    first_index = len(indptr) + len(last_page_lens)
    return _ReadPages(host[: len(indptr)], host[first_index:], host[len(indptr) : first_index])


def _workspace_bytes(shape: AttentionShape, device: torch.device) -> int:
    """Room for what a split call leaves to be merged, fp32: all tiles that the device runs at once, each at its largest."""
    num_tiles = _TILES_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    num_rows = shape.num_heads // shape.num_kv_heads * num_tiles * _MAX_TILE_ROWS
    return max(_MIN_WORKSPACE_BYTES, num_rows * (shape.head_dim + 1) * 4 + (1 << 20))


def _import_flashinfer() -> Any:
    # By name: it is installed where there is a GPU, and types are checked where there is none.
    with warnings.catch_warnings():
        # Deprecations in what it imports are its own affair.
        warnings.simplefilter("ignore")
        return importlib.import_module("flashinfer")
