"""Steps with prompts as a chain of CUDA graphs: all that lies between two layers' attention is one, attention is launched.

How attention is launched depends on the lengths of prompts; everything else depends on the number of rows alone.
"""

from dataclasses import dataclass, replace

import torch

from dataplane.model.decoder import Activations, Decoder, DecoderStep
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.graph_recorder import GraphRecorder
from dataplane.runner.lora_scope import LoraScope
from dataplane.runner.padded_steps import PaddedSteps
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraLaunches


@dataclass(frozen=True, slots=True)
class _Chain:
    """pieces: what comes before the first layer's attention, then what comes behind each. step: what they were captured with."""

    step: DecoderStep
    pieces: tuple[torch.cuda.CUDAGraph, ...]


class MixedGraphs:
    """A chain for each padded number of rows and each scope of LoRA."""

    def __init__(
        self, decoder: Decoder, sizes: tuple[int, ...], activations: Activations, pool: torch.Tensor, recorder: GraphRecorder
    ) -> None:
        """sizes: numbers of rows, ascending. activations: room for the last of them."""
        self.sizes = sizes
        self._decoder = decoder
        self._recorder = recorder
        # Attention leaves rows of padding as they are: what they start with must be something harmless.
        activations.attended.zero_()
        self._steps = PaddedSteps(decoder, sizes, activations, pool, decoder.attention, LoraLaunches.MIXED)
        self._chains: dict[tuple[int, LoraScope], _Chain] = {}

    def capture(self, buffers: StepBuffers, idle: StepArrays) -> None:
        """Captures all sizes, the largest first, so that the others find room in its memory. idle: a step of one short prompt."""
        for size in reversed(self.sizes):
            inputs = buffers.upload(idle, size)
            # Loads the kernels of this size, which a capture must not.
            self._decoder.run(self._steps.make(inputs, LoraScope.ALL))
            for scope in LoraScope:
                step = self._steps.make(inputs, scope)
                self._chains[size, scope] = _Chain(step, self._pieces(step))

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [S, vocab] fp32 of a step padded to one of the sizes."""
        scope, plan = self._steps.plan(inputs)
        chain = self._chains[len(inputs.token_ids), scope]
        step = replace(chain.step, inputs=inputs, plan=plan)
        chain.pieces[0].replay()
        for layer, piece in enumerate(chain.pieces[1:]):
            self._decoder.attend(step, layer)
            piece.replay()
        return self._decoder.logits(step)

    def _pieces(self, step: DecoderStep) -> tuple[torch.cuda.CUDAGraph, ...]:
        first = self._recorder.record(lambda: self._decoder.start(step))
        layers = range(self._decoder.config.num_layers)
        return (first, *(self._recorder.record(lambda i=i: self._decoder.proceed(step, i)) for i in layers))  # type: ignore[misc]
