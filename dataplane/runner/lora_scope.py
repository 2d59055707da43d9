"""Which linear modules of a step have adapters, as far as graphs tell them apart."""

from enum import Enum

from dataplane.model.lora_step import LoraGroups
from kernels.lora import LoraPlan


class LoraScope(Enum):
    """Whether graphs launch the adapter part of q, k and v; of o; of gate and up; of down.

    Most adapters change attention alone, and a launch for nothing costs a layer about as much as its norms.
    """

    NONE = (False, False, False, False)
    ATTENTION = (True, True, False, False)
    ALL = (True, True, True, True)

    @staticmethod
    def of(plan: LoraPlan, groups: LoraGroups) -> "LoraScope":
        """The smallest one that holds all that the plan changes."""
        changed = [plan.changes(group) for group in groups]
        return next(scope for scope in LoraScope if all(s or not c for s, c in zip(scope.value, changed, strict=True)))
