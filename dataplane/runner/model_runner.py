"""Turns a packed step into tensors, runs the model and chooses the tokens. Owns the pool tensor; decides nothing."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dataplane.engine.step_packer import ScheduledChunk
from dataplane.model.step_inputs import StepInputs
from dataplane.runner.sampling import SampledToken, SamplingRow, sample
from kernels.lora import LoraAdapter


class ModelRunner(Protocol):
    """The model as the engine sees it."""

    def run(self, chunks: Sequence[ScheduledChunk]) -> tuple[SampledToken, ...]:
        """Computes the chunks; returns one token for each that `is_last`, in order."""
        ...


class ForwardModel(Protocol):
    """The decoder as the runner sees it."""

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Logits [num_logits_rows, vocab] in float32."""
        ...


class TorchModelRunner:
    """Runs the decoder over the pool tensor [num_layers, num_pages, page_elems]."""

    def __init__(
        self,
        model: ForwardModel,
        pool: torch.Tensor,
        page_tokens: int,
        eos_token_ids: Sequence[int],
        adapter_of: Callable[[str], LoraAdapter],
    ) -> None:
        """adapter_of: where the rows of an adapter that is on the device lie, by digest."""
        self._model = model
        self._pool = pool
        self._page_tokens = page_tokens
        self._eos_token_ids = tuple(eos_token_ids)
        self._adapter_of = adapter_of

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> tuple[SampledToken, ...]:
        """Computes the chunks; returns one token for each that `is_last`, in order."""
        logits = self._model.forward(self._step_inputs(chunks), self._pool)
        rows = [SamplingRow(r.sampling, r.token_ids, r.num_prompt_tokens) for r in (c.request for c in chunks if c.is_last)]
        return sample(logits, rows, self._eos_token_ids)

    def _step_inputs(self, chunks: Sequence[ScheduledChunk]) -> StepInputs:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        adapter_index: list[int] = []
        index_of: dict[str, int] = {}
        for chunk in chunks:
            request = chunk.request
            first, last = request.num_computed_tokens, request.num_computed_tokens + chunk.num_scheduled_tokens
            token_ids += request.token_ids[first:last]
            positions += range(first, last)
            slots += self._slots(request.page_table, first, last)
            query_starts.append(len(token_ids))
            digest = request.adapter_digest
            index = index_of.setdefault(digest, len(index_of)) if digest else -1
            adapter_index += [index] * chunk.num_scheduled_tokens
        return StepInputs(
            token_ids=self._int64(token_ids),
            positions=self._int64(positions),
            slots=self._int64(slots),
            query_starts=tuple(query_starts),
            context_lens=tuple(c.request.num_computed_tokens + c.num_scheduled_tokens for c in chunks),
            page_tables=tuple(tuple(chunk.request.page_table) for chunk in chunks),
            logits_rows=self._int64([end - 1 for chunk, end in zip(chunks, query_starts[1:], strict=True) if chunk.is_last]),
            adapter_index=tuple(adapter_index),
            adapters=tuple(self._adapter_of(digest) for digest in index_of),
        )

    def _slots(self, page_table: Sequence[int], first: int, last: int) -> list[int]:
        size = self._page_tokens
        return [page_table[position // size] * size + position % size for position in range(first, last)]

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._pool.device)
