"""The adapter part of one step's linear modules: of which inputs there is any, and the plan that says what to add."""

from collections.abc import Sequence

import torch

from kernels.lora import LoraOps, LoraPlan, LoraTarget

LoraGroups = Sequence[tuple[LoraTarget, ...]]


class LoraStep:
    """What the decoder calls behind each base matrix. `groups` are the targets of q, k and v, of o, of gate and up, of down."""

    def __init__(self, ops: LoraOps, groups: LoraGroups, plan: LoraPlan, wanted: Sequence[bool]) -> None:
        """wanted: for which groups anything is launched."""
        self._ops = ops
        self._groups = groups
        self._plan = plan
        self._wanted = wanted

    @staticmethod
    def as_needed(ops: LoraOps, groups: LoraGroups, plan: LoraPlan) -> "LoraStep":
        """Launches for the groups that the plan changes."""
        return LoraStep(ops, groups, plan, [plan.changes(group) for group in groups])

    def begin(self) -> None:
        """Prepares the step on the device, before its first add."""
        if any(self._wanted):
            self._ops.begin(self._plan)

    def add(self, group: int, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor) -> None:
        """Adds the adapters' part of a group's modules to y, the base model's part. layer_pool: one layer of the pool, flat."""
        if self._wanted[group]:
            self._ops.add(y, x, layer_pool, self._plan, self._groups[group])
