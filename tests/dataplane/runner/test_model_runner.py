"""What the model is told about a packed step, and that what it says is sampled row by row."""

import torch

from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.model.step_inputs import StepInputs
from dataplane.runner.model_runner import TorchModelRunner
from kernels.lora import LoraAdapter
from protos.planes import AdmittedRequest, EngineSampling

VOCAB = 10


class RecordingModel:
    """Keeps what it was told; its logits name the row they belong to."""

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        self.inputs = inputs
        return torch.nn.functional.one_hot(inputs.logits_rows, VOCAB).float()


def _request(key: int, token_ids: list[int], num_computed: int, pages: list[int], digest: str = "") -> RequestState:
    request = RequestState(AdmittedRequest(key, "r", tuple(token_ids), 0, digest, EngineSampling(max_tokens=9)), 0.0)
    request.num_computed_tokens = num_computed
    request.page_table = pages
    return request


def test_step_inputs_name_each_token_its_place_and_its_adapter() -> None:
    adapters = {"x": LoraAdapter({}), "y": LoraAdapter({})}
    model = RecordingModel()
    runner = TorchModelRunner(model, torch.zeros(1, 8, 8), 4, (), adapters.__getitem__)
    chunks = [
        ScheduledChunk(_request(1, [1, 2, 3, 4, 5, 6], 5, [7, 2], "y"), 1),
        ScheduledChunk(_request(2, [9], 0, [0]), 1),
        ScheduledChunk(_request(3, [1, 2, 3, 4, 5, 6], 2, [5, 3], "x"), 3),
        ScheduledChunk(_request(4, [3, 4], 0, [1], "y"), 2),
    ]
    sampled = runner.run(chunks)
    inputs = model.inputs
    assert inputs.token_ids.tolist() == [6, 9, 3, 4, 5, 3, 4]
    assert inputs.positions.tolist() == [5, 0, 2, 3, 4, 0, 1]
    assert inputs.slots.tolist() == [9, 0, 22, 23, 12, 4, 5]
    assert inputs.query_starts == (0, 1, 2, 5, 7)
    assert inputs.context_lens == (6, 1, 5, 2)
    assert inputs.page_tables == ((7, 2), (0,), (5, 3), (1,))
    assert inputs.logits_rows.tolist() == [0, 1, 6], "the third request has a token to go"
    assert inputs.adapter_index == (0, -1, 1, 1, 1, 0, 0)
    assert [a is b for a, b in zip(inputs.adapters, (adapters["y"], adapters["x"]), strict=True)] == [True, True]
    assert [s.token_id for s in sampled] == [0, 1, 6]
