"""The decoder with its launches captured in CUDA graphs, where they can be: a step costs the host little more than its plan.

Knows steps by their numbers of rows; nothing of requests.
"""

import logging
import time

import torch

from dataplane.model.decoder import Decoder
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.decode_graphs import DecodeGraphs
from dataplane.runner.graph_recorder import GraphRecorder
from dataplane.runner.idle_step import idle_step
from dataplane.runner.lora_scope import LoraScope
from dataplane.runner.mixed_graphs import MixedGraphs
from dataplane.runner.padded_sizes import decode_sizes, mixed_sizes, smallest_size
from dataplane.runner.step_buffers import StepBuffers

_log = logging.getLogger(__name__)


class GraphedModel:
    """A ForwardModel. Until `capture`, and where nothing can be captured, every step is launched by the decoder as it stands."""

    def __init__(self, decoder: Decoder, max_num_seqs: int, token_budget: int) -> None:
        """max_num_seqs, token_budget: requests and tokens of the largest step; it is never padded beyond."""
        self._decoder = decoder
        self._decode_sizes = decode_sizes(max_num_seqs)
        self._mixed_sizes = mixed_sizes(token_budget)
        self._decode: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None

    @property
    def can_be_captured(self) -> bool:
        """Whether LoRA and attention run on kernels that can be."""
        return self._decoder.lora.can_be_captured and self._decoder.attention.can_be_captured

    @property
    def captured_rows(self) -> tuple[int, ...]:
        """Rows of each step that `capture` captures."""
        return tuple(size for size in (*self._decode_sizes, *self._mixed_sizes) for _ in LoraScope)

    def num_rows(self, step: StepArrays) -> int:
        """To how many rows a step is padded."""
        graphs = self._decode if step.is_decode else self._mixed
        size = smallest_size(graphs.sizes, step.num_tokens) if graphs is not None else None
        return step.num_tokens if size is None else size

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Logits [S, vocab] in float32 of the rows that are wanted; good until the next call, and the caller's to overwrite.

        pool: once captured, the one that it was captured with.
        """
        graphs = self._decode if inputs.host.is_decode else self._mixed
        if graphs is not None and len(inputs.token_ids) in graphs.sizes:
            return graphs.forward(inputs)
        return self._decoder.forward(inputs, pool)

    @torch.inference_mode()
    def capture(self, buffers: StepBuffers, pool: torch.Tensor) -> None:
        """Captures the graphs of all sizes, once, over the buffers and the pool that all steps will use.

        pool: [num_layers, num_pages + 1, page_elems], whose last page takes what padding writes.
        """
        if not self.can_be_captured:
            return
        start, free_before = time.perf_counter(), torch.cuda.mem_get_info(pool.device)[0]
        decoder, recorder = self._decoder, GraphRecorder(pool.device)
        activations = decoder.allocate(max(self._decode_sizes[-1], self._mixed_sizes[-1]))
        padding_page = pool.shape[1] - 1
        page_tokens = pool.shape[2] // (2 * decoder.config.kv_dim)
        mixed = MixedGraphs(decoder, self._mixed_sizes, activations, pool, recorder)
        mixed.capture(buffers, idle_step(padding_page, page_tokens, is_decode=False))
        decode = DecodeGraphs(decoder, self._decode_sizes, activations, pool, recorder)
        decode.capture(buffers, idle_step(padding_page, page_tokens, is_decode=True))
        torch.cuda.synchronize(pool.device)
        self._mixed, self._decode = mixed, decode
        taken = free_before - torch.cuda.mem_get_info(pool.device)[0]
        _log.info("graphs captured num=%d seconds=%.1f bytes=%d", recorder.num_graphs, time.perf_counter() - start, taken)
