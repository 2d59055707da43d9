"""The model as the runner calls it, with a note of when it was called and with what: that splits the host's time of a launch."""

import time
from dataclasses import dataclass

import torch

from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.model_runner import ForwardModel


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Seconds of the host in one launch.

    arrays: describing the step in arrays. upload: writing them side by side and starting their copy. forward: plans of attention
    and LoRA, and the launch of the model. sampling: the sampler's launch.
    """

    arrays_s: float
    upload_s: float
    forward_s: float
    sampling_s: float

    @property
    def launch_s(self) -> float:
        """All of it."""
        return self.arrays_s + self.upload_s + self.forward_s + self.sampling_s


class RecordingModel:
    """Passes everything on to the real model; `inputs` are the last step's."""

    def __init__(self, model: ForwardModel) -> None:
        self.model = model
        self.inputs: StepInputs | None = None
        self._described_at = self._forward_at = self._launched_at = 0.0

    def num_rows(self, step: StepArrays) -> int:
        """To how many rows a step is padded."""
        self._described_at = time.perf_counter()
        return self.model.num_rows(step)

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """The model's logits."""
        self.inputs = inputs
        self._forward_at = time.perf_counter()
        logits = self.model.forward(inputs, pool)
        self._launched_at = time.perf_counter()
        return logits

    def host_times(self, started_at: float, ended_at: float) -> HostTimes:
        """Of the last launch, which began and ended then (time.perf_counter)."""
        return HostTimes(
            self._described_at - started_at,
            self._forward_at - self._described_at,
            self._launched_at - self._forward_at,
            ended_at - self._launched_at,
        )
