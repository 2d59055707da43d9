"""The LoRA operation of a data plane without LoRA: none. Shows what a batch without adapters pays for those that could come."""

from collections.abc import Sequence

import torch

from dataplane.parts import Parts
from kernels.lora import Indices, LoraAdapter, LoraLaunches, LoraOps, LoraPlan, LoraTarget
from kernels.plan_layout import LoraLimits


class _NothingPlan(LoraPlan):
    is_empty = True

    def changes(self, targets: Sequence[LoraTarget]) -> bool:
        """Never."""
        return False


class _NoLora(LoraOps):
    """Adds nothing, and can be left out of any graph."""

    can_be_captured = True

    def plan(
        self, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches = LoraLaunches.AS_NEEDED
    ) -> LoraPlan:
        """An empty one."""
        assert not adapters, "a step with adapters on a model without LoRA"
        return _NothingPlan()

    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: LoraPlan, targets: Sequence[LoraTarget]
    ) -> None:
        """Nothing."""


def _no_lora(groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype, device: torch.device, limits: LoraLimits) -> LoraOps:
    return _NoLora()


WITHOUT_LORA = Parts(lora_ops=_no_lora)
