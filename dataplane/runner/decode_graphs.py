"""Steps of decodes alone as one CUDA graph each: by padded number of rows and by scope of LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from dataplane.model.decoder import Activations, Decoder, DecoderStep
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.graph_recorder import GraphRecorder
from dataplane.runner.lora_scope import LoraScope
from dataplane.runner.padded_steps import PaddedSteps
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraLaunches

# With 7B parameters a step of 32 to 192 rows is 0.1 to 0.2 ms shorter, one of fewer as long.
_MAX_LT_ROWS = 192


class DecodeGraphs:
    """A replay computes what was uploaded and planned last: tokens, page tables, adapters."""

    def __init__(
        self, decoder: Decoder, sizes: tuple[int, ...], activations: Activations, pool: torch.Tensor, recorder: GraphRecorder
    ) -> None:
        """sizes: numbers of rows, ascending. activations: room for the last of them."""
        self.sizes = sizes
        self._decoder = decoder
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
            # Loads the kernels of this size, which a capture must not.
            self.launch(self._steps.make(inputs, LoraScope.ALL))
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
        num_rows = len(step.activations.hidden)
        with _cublaslt() if num_rows <= _MAX_LT_ROWS else nullcontext():
            self._decoder.run(step, out=self._logits[:num_rows])


@contextmanager
def _cublaslt() -> Iterator[None]:
    """Lets torch multiply with cuBLASLt, which finds faster kernels for few rows than cuBLAS does.

    torch calls this choice experimental, once, in a line on stderr. That is no Python warning, so no filter can hold it back.
    """
    choose = torch.backends.cuda.preferred_blas_library
    before = choose()
    choose("cublaslt")
    try:
        yield
    finally:
        choose(before)
