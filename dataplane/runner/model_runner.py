"""Turns a packed step into tensors, runs the model and chooses the tokens. Owns the pool tensor; decides nothing."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from dataplane.engine.model_runner import LaunchedStep
from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.model.step_inputs import Ints, StepArrays, StepInputs, starts_of
from dataplane.runner.sampling import Sampler, SamplingRow
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraAdapter


class ForwardModel(Protocol):
    """The decoder as the runner sees it."""

    def num_rows(self, step: StepArrays) -> int:
        """To how many rows a step is padded."""
        ...

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Logits [S, vocab] in float32 of the rows that are wanted; good until the next call, and the caller's to overwrite."""
        ...


class TorchModelRunner:
    """Runs the decoder over the pool tensor [num_layers, num_pages + 1, page_elems]; its last page takes what padding writes."""

    def __init__(
        self,
        model: ForwardModel,
        pool: torch.Tensor,
        buffers: StepBuffers,
        sampler: Sampler,
        page_tokens: int,
        adapter_of: Callable[[str], LoraAdapter],
        runs_ahead: bool,
    ) -> None:
        """adapter_of: where the rows of an adapter that is on the device lie, by digest."""
        self._model = model
        self._pool = pool
        self._buffers = buffers
        self._sampler = sampler
        self._page_tokens = page_tokens
        self._adapter_of = adapter_of
        self._runs_ahead = runs_ahead
        # Rows of the logits of the step launched last, by request: where its unknown tokens are chosen.
        self._rows: dict[RequestState, int] = {}

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self._runs_ahead

    @torch.inference_mode()
    def launch(self, chunks: Sequence[ScheduledChunk]) -> LaunchedStep:
        """Starts computing the chunks."""
        step = self._step_arrays(chunks)
        inputs = self._buffers.upload(step, self._model.num_rows(step), self._sampler.chosen)
        logits = self._model.forward(inputs, self._pool)
        last = [chunk.request for chunk in chunks if chunk.is_last]
        rows = [self._sampling_row(request) for request in last]
        launched = self._sampler.launch(logits, rows)
        self._rows = {request: i for i, request in enumerate(last)}
        return launched

    def _sampling_row(self, request: RequestState) -> SamplingRow:
        unknown_row = self._rows[request] if request.num_unknown_tokens else -1
        return SamplingRow(request.sampling, request.token_ids, request.num_prompt_tokens, unknown_row)

    def _step_arrays(self, chunks: Sequence[ScheduledChunk]) -> StepArrays:
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        lengths = np.array([chunk.num_scheduled_tokens for chunk in chunks], dtype=np.int32)
        context_lens = starts + lengths
        num_pages = -(-context_lens // self._page_tokens)
        tables = [chunk.request.page_table[:n] for chunk, n in zip(chunks, num_pages.tolist(), strict=True)]
        page_starts, query_starts = starts_of(num_pages), starts_of(lengths)
        page_ids = np.concatenate(tables)
        positions = np.arange(query_starts[-1], dtype=np.int32) + np.repeat(starts - query_starts[:-1], lengths)
        pages = page_ids[np.repeat(page_starts[:-1], lengths) + positions // self._page_tokens]
        is_last = np.array([chunk.is_last for chunk in chunks])
        index_of: dict[str, int] = {}
        indices = [index_of.setdefault(d, len(index_of)) if d else -1 for d in (c.request.adapter_digest for c in chunks)]
        return StepArrays(
            token_ids=np.concatenate([self._token_ids(chunk) for chunk in chunks]),
            positions=positions,
            slots=pages * self._page_tokens + positions % self._page_tokens,
            query_starts=query_starts,
            context_lens=context_lens,
            page_starts=page_starts,
            page_ids=page_ids,
            logits_rows=query_starts[1:][is_last] - 1,
            adapter_index=np.repeat(np.array(indices, dtype=np.int32), lengths),
            adapters=tuple(self._adapter_of(digest) for digest in index_of),
            num_decodes=sum(chunk.is_decode for chunk in chunks),
        )

    def _token_ids(self, chunk: ScheduledChunk) -> Ints:
        """The chunk's tokens; for one that is still being chosen, the row in which it is."""
        request, end = chunk.request, chunk.start + chunk.num_scheduled_tokens
        known = request.token_ids[chunk.start : end]
        if end <= len(request.token_ids):
            return known
        return np.append(known, np.int32(-1 - self._rows[request]))
