"""What can be wrong with a model directory.

ModelError
├── ModelConfigError    config.json or generation_config.json asks for something that is not computed here
└── ModelWeightsError   the safetensors files do not hold the tensors that the configuration promises
"""

from collections.abc import Sequence
from pathlib import Path


class ModelError(Exception):
    """A model directory that cannot be served; `violations` names everything that is wrong, not only the first thing."""

    def __init__(self, path: Path, violations: Sequence[str]) -> None:
        self.path = path
        self.violations = tuple(dict.fromkeys(violations))
        super().__init__(f"{path}: " + "; ".join(self.violations))


class ModelConfigError(ModelError):
    """A configuration that is malformed, or a field of it that would not be honoured."""


class ModelWeightsError(ModelError):
    """Weights that are missing, unexpected, misshaped or truncated."""
