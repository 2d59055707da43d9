"""Steps of decodes alone as one CUDA graph each: a graph for each padded number of rows and each scope of LoRA."""

import torch

from dataplane.model.decoder import Activations, Decoder, DecoderStep
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.graph_recorder import GraphRecorder
from dataplane.runner.lora_scope import LoraScope
from dataplane.runner.padded_steps import PaddedSteps
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraLaunches


class DecodeGraphs:
    """A replay computes what was uploaded and planned last: tokens, page tables, adapters."""

    def __init__(
        self, decoder: Decoder, sizes: tuple[int, ...], activations: Activations, pool: torch.Tensor, recorder: GraphRecorder
    ) -> None:
        """sizes: numbers of rows, ascending. activations: room for the last of them."""
        self.sizes = sizes
        self._recorder = recorder
        max_rows, num_pages = sizes[-1], pool.shape[1]
        # No page belongs to two requests, so together they read no more pages than there are.
        attention = decoder.attention.for_decode_graphs(max_rows, num_pages + max_rows, padding_page=num_pages - 1)
        self._steps = PaddedSteps(decoder, sizes, activations, pool, attention, LoraLaunches.DECODE)
        self._logits = torch.empty((max_rows, decoder.config.vocab_size), dtype=torch.float32, device=pool.device)
        self._graphs: dict[tuple[int, LoraScope], torch.cuda.CUDAGraph] = {}

    def capture(self, buffers: StepBuffers, idle: StepArrays) -> None:
        """Captures all sizes, the largest first, so that the others find room in its memory. idle: a step of one decode."""
        for size in reversed(self.sizes):
            inputs = buffers.upload(idle, size)
            self.launch(self._steps.make(inputs, LoraScope.ALL))  # loads the kernels of this size, which a capture must not
            for scope in LoraScope:
                step = self._steps.make(inputs, scope)
                self._graphs[size, scope] = self._recorder.record(lambda step=step: self.launch(step))  # type: ignore[misc]

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [S, vocab] fp32 of a step padded to one of the sizes; overwritten by the next one."""
        scope, _ = self._steps.plan(inputs)
        self._graphs[len(inputs.token_ids), scope].replay()
        return self._logits[: inputs.host.num_tokens]

    def launch(self, step: DecoderStep) -> None:
        """The launches of a step, those that its graph holds."""
        decoder = self._steps.decoder
        decoder.start(step)
        for layer in range(decoder.config.num_layers):
            decoder.attend(step, layer)
            decoder.proceed(step, layer)
        decoder.logits(step, out=self._logits[: len(step.activations.hidden)])
