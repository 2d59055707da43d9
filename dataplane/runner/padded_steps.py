"""The decoder's steps as graphs know them: padded to a few sizes, over activations that stay where they are."""

import torch

from dataplane.attention.interface import AttentionBackend, AttentionPlan
from dataplane.model.decoder import Activations, Decoder, DecoderStep
from dataplane.model.lora_step import LoraStep
from dataplane.model.step_inputs import StepInputs
from dataplane.runner.lora_scope import LoraScope
from kernels.lora import LoraLaunches


class PaddedSteps:
    """Makes steps to capture, and plans those to replay."""

    def __init__(
        self,
        decoder: Decoder,
        sizes: tuple[int, ...],
        activations: Activations,
        pool: torch.Tensor,
        attention: AttentionBackend,
        launches: LoraLaunches,
    ) -> None:
        """sizes: numbers of rows, ascending. activations: room for the last of them. launches: of LoRA, in every step."""
        self._decoder = decoder
        self._launches = launches
        self._attention = attention
        self._pools = decoder.pools(pool)
        self._activations = {size: activations.first(decoder.config, size) for size in sizes}

    def make(self, inputs: StepInputs, scope: LoraScope) -> DecoderStep:
        """A step of these rows whose launches serve every step of as many rows and of that scope."""
        decoder, activations = self._decoder, self._activations[len(inputs.token_ids)]
        lora_plan = decoder.lora.plan([], [], self._launches)
        lora = LoraStep(decoder.lora, decoder.lora_groups, lora_plan, scope.value)
        plan = self._attention.plan(inputs, activations.q, activations.out)
        return DecoderStep(inputs, self._pools, activations, lora, self._attention, plan)

    def plan(self, inputs: StepInputs) -> tuple[LoraScope, AttentionPlan]:
        """Brings to the device what a captured step of these rows will read. Returns the scope that it must have."""
        host, decoder = inputs.host, self._decoder
        scope = LoraScope.NONE
        if host.adapters:
            lora_plan = decoder.lora.plan(host.adapter_index, host.adapters, self._launches)
            scope = LoraScope.of(lora_plan, decoder.lora_groups)
        activations = self._activations[len(inputs.token_ids)]
        return scope, self._attention.plan(inputs, activations.q, activations.out)
