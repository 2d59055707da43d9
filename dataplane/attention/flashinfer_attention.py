"""Attention over the page pool with FlashInfer's kernels, which read K and V from strided views of the pool itself.

Knows pages and slots as numbers, like the interface it implements; whether FlashInfer can serve a model is decided elsewhere.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dataplane.attention.flashinfer_decode_graphs import FlashInferDecodeGraphs
from dataplane.attention.flashinfer_wrappers import WindowWrappers, Workspace
from dataplane.attention.interface import AttentionBackend, AttentionPlan, AttentionShape, KvPages
from dataplane.attention.packed_ints import PackedInts
from dataplane.attention.read_pages import ReadPages
from dataplane.flashinfer_library import import_flashinfer
from dataplane.model.step_inputs import StepArrays, StepInputs

# Rows whose numbers are held ready; a step of more makes its own.
_MAX_NUMBERED_ROWS = 1 << 16
_FIRST_PACKED_INTS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class FlashInferPlan(AttentionPlan):
    """The rows that decode and those that do not, none of which may be there. The rest lives in FlashInfer's wrappers."""

    decode_q: torch.Tensor | None
    decode_out: torch.Tensor | None
    prefill_q: torch.Tensor | None
    prefill_out: torch.Tensor | None


class FlashInferAttention(AttentionBackend):
    """One decode call for the requests of one row that lead the step, one prefill call for all others.

    `plan` does all that a host must do and leaves what kernels read in buffers of this object and of FlashInfer's wrappers;
    `append` and `attend` only launch. One plan lives at a time.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        """Compiles the kernels, or loads them where this machine has compiled them before."""
        self._shape = shape
        self._flashinfer = import_flashinfer()
        self._workspace = Workspace(shape, device)
        self._wrappers = {w: WindowWrappers(self._flashinfer, shape, dtype, w, self._workspace) for w in shape.windows}
        self._calls = {w: _WindowCalls(wrappers, shape.page_tokens, w, device) for w, wrappers in self._wrappers.items()}
        self._rows = torch.arange(_MAX_NUMBERED_ROWS, dtype=torch.int32, device=device)
        self._current: FlashInferPlan | None = None
        self._warm(dtype, device)

    @property
    def can_be_captured(self) -> bool:
        """Whether `append` and the attention of `for_decode_graphs` may be captured in CUDA graphs."""
        return True

    def for_decode_graphs(self, max_rows: int, max_pages: int, padding_page: int) -> FlashInferDecodeGraphs:
        """A backend for steps of decodes alone whose `attend` launches the same for every step of P rows."""
        self._workspace.reserve(max_rows)
        return FlashInferDecodeGraphs(self, self._wrappers, self._shape.page_tokens, max_rows, max_pages, padding_page)

    def append(self, k: torch.Tensor, v: torch.Tensor, pages: KvPages, inputs: StepInputs) -> None:
        """Writes the rows' keys and values to their slots, padding rows' too."""
        num_rows = len(k)
        rows = self._rows
        if num_rows >= len(rows):
            rows = torch.arange(num_rows + 1, dtype=torch.int32, device=rows.device)
        # FlashInfer appends at positions of requests; here each row is a request that has one page, the one of its slot.
        numbers = rows[:num_rows]
        self._flashinfer.append_paged_kv_cache(
            k,
            v,
            numbers,
            inputs.slot_offsets,
            (pages.k, pages.v),
            inputs.slot_pages,
            rows[: num_rows + 1],
            numbers,  # lengths of last pages: only their number is looked at
        )

    def plan(self, inputs: StepInputs, q: torch.Tensor, out: torch.Tensor) -> FlashInferPlan:
        """Prepares one step. Ends what was planned before."""
        step = inputs.host
        for calls in self._calls.values():
            calls.plan(step)
        n, end = step.num_decodes, step.num_tokens
        decode = (q[:n], out[:n]) if n else (None, None)
        prefill = (q[n:end], out[n:end]) if n < end else (None, None)
        self._current = FlashInferPlan(*decode, *prefill)
        return self._current

    def attend(self, plan: AttentionPlan, pages: KvPages, sliding_window: int | None) -> None:
        """Attends causally through the page tables."""
        assert isinstance(plan, FlashInferPlan) and plan is self._current, "a plan is good until the next one is made"
        calls, kv_pages = self._calls[sliding_window], (pages.k, pages.v)
        if plan.decode_q is not None:
            calls.decode.run(plan.decode_q, kv_pages, out=plan.decode_out)
        if plan.prefill_q is not None:
            calls.prefill.run(plan.prefill_q, kv_pages, out=plan.prefill_out)

    def _warm(self, dtype: torch.dtype, device: torch.device) -> None:
        """Runs everything once on a pool of one page: a step must not wait for a compiler."""
        shape = self._shape
        pool = torch.zeros((1, 2 * shape.page_tokens * shape.num_kv_heads * shape.head_dim), dtype=dtype, device=device)
        pages = KvPages.of(pool, shape.num_kv_heads, shape.head_dim)
        host = _decode_and_prompt()
        zeros = torch.zeros(3, dtype=torch.int32, device=device)
        inputs = StepInputs(host, zeros, zeros, zeros, zeros, zeros)
        q = torch.zeros((3, shape.num_heads, shape.head_dim), dtype=dtype, device=device)
        k = torch.zeros((3, shape.num_kv_heads, shape.head_dim), dtype=dtype, device=device)
        plan = self.plan(inputs, q, torch.empty_like(q))
        self.append(k, k, pages, inputs)
        for window in shape.windows:
            self.attend(plan, pages, window)
        torch.cuda.synchronize(device)


class _WindowCalls:
    """The wrappers for the layers of one sliding window, planned for the current step."""

    def __init__(self, wrappers: WindowWrappers, page_tokens: int, window: int | None, device: torch.device) -> None:
        self._wrappers = wrappers
        self._page_tokens = page_tokens
        self._window = window
        self._packed = PackedInts(_FIRST_PACKED_INTS, device)
        self._device = device
        self.decode = wrappers.decode()
        self.prefill = wrappers.prefill()

    def plan(self, step: StepArrays) -> None:
        """Copies the step's page tables to the device and plans the calls that it needs."""
        pages = ReadPages.of(step, self._page_tokens, self._window)
        n = step.num_decodes
        num_decode_pages = int(pages.indptr[n])
        decode = (pages.indptr[: n + 1], pages.last_page_lens[:n])
        prefill = (step.query_starts[n:] - n, pages.indptr[n:] - num_decode_pages, pages.last_page_lens[n:])
        arrays = (*decode, *prefill, pages.indices)
        num_ints = sum(map(len, arrays))
        if num_ints > self._packed.size:
            self._packed = PackedInts(2 * num_ints, self._device)
        on_host, on_device = self._packed.send(*arrays)
        if n:
            indptr, last_page_lens = on_host[:2]
            self._wrappers.plan_decode(self.decode, indptr, last_page_lens, on_host[-1][:num_decode_pages])
            # Where kernels read them; planning needs them on the host.
            self.decode._paged_kv_indptr_buf, self.decode._paged_kv_last_page_len_buf = on_device[:2]
            self.decode._paged_kv_indices_buf = on_device[-1]
        if n < step.num_requests:
            starts, indptr, last_page_lens = on_host[2:5]
            # FlashInfer copies these once more.
            self._wrappers.plan_prefill(self.prefill, starts, indptr, last_page_lens, on_device[-1][num_decode_pages:])


def _decode_and_prompt() -> StepArrays:
    """A decode and a prompt of two tokens, in the same page."""

    def ints(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, dtype=np.int32)

    zeros = ints(0, 0, 0)
    return StepArrays(
        zeros, zeros, zeros, ints(0, 1, 3), ints(1, 2), ints(0, 1, 2), ints(0, 0), ints(), ints(-1, -1, -1), (), num_decodes=1
    )
