"""What the model is told about a packed step, and that what it says is sampled row by row."""

from collections.abc import Sequence

import torch

from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.model_runner import TorchModelRunner
from dataplane.runner.sampling import Sampler
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraAdapter
from protos.planes import AdmittedRequest, EngineSampling

VOCAB = 10
CPU = torch.device("cpu")


class RecordingModel:
    """Keeps what it was told, padded to 8 rows; its logits name the row they belong to."""

    def num_rows(self, step: StepArrays) -> int:
        return max(8, step.num_tokens)

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        self.inputs = inputs
        self.token_ids = inputs.token_ids.tolist()
        return torch.nn.functional.one_hot(inputs.logits_rows.long(), VOCAB).float()


def _runner(model: RecordingModel, adapters: dict[str, LoraAdapter]) -> TorchModelRunner:
    buffers, sampler = StepBuffers(64, 4, 99, CPU), Sampler(VOCAB, (), 16, CPU)
    return TorchModelRunner(model, torch.zeros(1, 100, 8), buffers, sampler, 4, adapters.__getitem__, runs_ahead=True)


def _request(key: int, token_ids: Sequence[int], num_computed: int, pages: list[int], digest: str = "") -> RequestState:
    request = RequestState(AdmittedRequest(key, "r", tuple(token_ids), 0, digest, EngineSampling(max_tokens=9)), 0.0, 100)
    if num_computed:
        request.launch(num_computed)
    request.add_pages(pages)
    return request


def _chunk(request: RequestState, num_tokens: int, is_decode: bool = False) -> ScheduledChunk:
    is_last = num_tokens == request.num_pending_tokens
    return ScheduledChunk(request, request.num_computed_tokens, num_tokens, is_decode, is_last)


def test_step_inputs_name_each_token_its_place_and_its_adapter() -> None:
    adapters = {"x": LoraAdapter({}), "y": LoraAdapter({})}
    model = RecordingModel()
    chunks = [
        _chunk(_request(1, [1, 2, 3, 4, 5, 6], 5, [7, 2], "y"), 1, is_decode=True),
        _chunk(_request(2, [9], 0, [0, 8]), 1),
        _chunk(_request(3, [1, 2, 3, 4, 5, 6], 2, [5, 3], "x"), 3),
        _chunk(_request(4, [3, 4], 0, [1], "y"), 2),
    ]
    sampled = _runner(model, adapters).launch(chunks).wait()
    inputs, step = model.inputs, model.inputs.host
    assert model.token_ids == [6, 9, 3, 4, 5, 3, 4, 0]
    assert step.positions.tolist() == [5, 0, 2, 3, 4, 0, 1]
    assert step.slots.tolist() == [9, 0, 22, 23, 12, 4, 5]
    assert step.query_starts.tolist() == [0, 1, 2, 5, 7]
    assert step.context_lens.tolist() == [6, 1, 5, 2]
    assert (step.page_starts.tolist(), step.page_ids.tolist()) == ([0, 2, 3, 5, 6], [7, 2, 0, 5, 3, 1]), "pages in use alone"
    assert inputs.logits_rows.tolist() == [0, 1, 6], "the third request has a token to go"
    assert step.adapter_index.tolist() == [0, -1, 1, 1, 1, 0, 0]
    assert (step.num_tokens, step.num_requests, step.num_decodes, step.is_decode) == (7, 4, 1, False)
    assert [a is b for a, b in zip(step.adapters, (adapters["y"], adapters["x"]), strict=True)] == [True, True]
    assert [s.token_id for s in sampled] == [0, 1, 6]


def test_a_token_that_is_not_known_yet_is_taken_from_the_row_that_chooses_it() -> None:
    model = RecordingModel()
    runner = _runner(model, {})
    first, second = _request(1, [4, 5], 0, [7]), _request(2, [6, 6, 6], 0, [8])
    launched = runner.launch([_chunk(first, 2), _chunk(second, 3)])
    first.launch(2)
    second.launch(3)
    # Rows 1 and 4 chose tokens 1 and 4; the next step has them the other way round, and nobody has waited.
    again = runner.launch([_chunk(second, 1, is_decode=True), _chunk(first, 1, is_decode=True)])
    assert model.inputs.host.token_ids.tolist() == [-2, -1]
    assert model.token_ids[:2] == [4, 1]
    assert model.inputs.host.positions.tolist() == [3, 2]
    assert [[s.token_id for s in step.wait()] for step in (launched, again)] == [[1, 4], [0, 1]]
