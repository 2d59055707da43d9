"""Attention of decode steps for CUDA graphs: FlashInfer's wrappers whose launches depend on the number of rows alone.

Knows pages and slots as numbers; the graphs themselves are made elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dataplane.attention.flashinfer_wrappers import WindowWrappers
from dataplane.attention.interface import AttentionBackend, AttentionPlan, KvPages
from dataplane.attention.packed_ints import PackedInts
from dataplane.attention.read_pages import ReadPages
from dataplane.model.step_inputs import StepInputs


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGraphPlan(AttentionPlan):
    """Rows of a step, and the wrappers for their number by sliding window."""

    q: torch.Tensor
    out: torch.Tensor
    wrappers: Mapping[int | None, Any]


class FlashInferDecodeGraphs(AttentionBackend):
    """One wrapper for each number of rows, made when that number is first planned; page tables at addresses that never change."""

    def __init__(
        self,
        appender: AttentionBackend,
        wrappers: Mapping[int | None, WindowWrappers],
        page_tokens: int,
        max_rows: int,
        max_pages: int,
        padding_page: int,
    ) -> None:
        """appender: writes K and V. max_rows, max_pages: of the largest step, padding included."""
        self._appender = appender
        self._wrappers = wrappers
        self._page_tokens = page_tokens
        self._max_pages = max_pages
        self._padding_page = padding_page
        num_ints = 2 * max_rows + 1 + max_pages
        self._packed = {window: PackedInts(num_ints, w.device) for window, w in wrappers.items()}
        self._made: dict[int, dict[int | None, Any]] = {}

    def append(self, k: torch.Tensor, v: torch.Tensor, pages: KvPages, inputs: StepInputs) -> None:
        """Writes the rows' keys and values to their slots, padding rows' too."""
        self._appender.append(k, v, pages, inputs)

    def plan(self, inputs: StepInputs, q: torch.Tensor, out: torch.Tensor) -> DecodeGraphPlan:
        """Prepares one step of decodes. Ends what was planned before."""
        step, num_rows = inputs.host, len(q)
        assert step.is_decode, f"{step.num_decodes} of {step.num_requests} requests decode"
        if num_rows not in self._made:
            self._made[num_rows] = self._make(num_rows)
        made = self._made[num_rows]
        for window, wrappers in self._wrappers.items():
            pages = ReadPages.of(step, self._page_tokens, window).padded(num_rows, self._padding_page)
            arrays = (pages.indptr, pages.last_page_lens, pages.indices)
            on_host, _ = self._packed[window].send(*arrays)
            wrappers.plan_decode(made[window], *on_host)
        return DecodeGraphPlan(q, out, made)

    def attend(self, plan: AttentionPlan, pages: KvPages, sliding_window: int | None) -> None:
        """Attends causally through the page tables."""
        assert isinstance(plan, DecodeGraphPlan), f"plan of another backend: {type(plan).__name__}"
        plan.wrappers[sliding_window].run(plan.q, (pages.k, pages.v), out=plan.out)

    def _make(self, num_rows: int) -> dict[int | None, Any]:
        lengths = (num_rows + 1, num_rows, self._max_pages)
        return {window: self._wrappers[window].decode(packed.places(*lengths)) for window, packed in self._packed.items()}
