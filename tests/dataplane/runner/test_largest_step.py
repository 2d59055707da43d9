"""The step that memory is measured with: legal, as large as steps get, and quick to run."""

import numpy as np
import pytest
import torch

from adapter_store.geometry import BaseGeometry, LinearShape
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.runner.largest_step import StepLimits, largest_adapter, largest_step, measure_step_bytes
from dataplane.runner.sampling import Sampler

PAGE_TOKENS = 16
GEOMETRY = BaseGeometry("base", "f", "float32", 2, 1, 8, (LinearShape("q_proj", 8, 8),), 16)
ADAPTER = largest_adapter(GEOMETRY, torch.device("cpu"))


@pytest.mark.parametrize(
    ("limits", "asked", "found"),
    [
        (StepLimits(token_budget=2048, max_num_seqs=256, max_model_len=2048), 2048, 2048),
        (StepLimits(token_budget=2048, max_num_seqs=256, max_model_len=100), 2048, 2048),
        (StepLimits(token_budget=8192, max_num_seqs=1, max_model_len=1 << 20), 8192, 8192),
        (StepLimits(token_budget=64, max_num_seqs=64, max_model_len=131072), 64, 64),
        (StepLimits(token_budget=64, max_num_seqs=64, max_model_len=131072), 8, 8),
        (StepLimits(token_budget=100, max_num_seqs=10, max_model_len=1), 100, 10),
        (StepLimits(token_budget=100, max_num_seqs=4, max_model_len=7), 100, 28),
    ],
)
def test_a_largest_step_is_legal_and_has_all_the_tokens_there_can_be(limits: StepLimits, asked: int, found: int) -> None:
    step = largest_step(limits, asked, PAGE_TOKENS, ADAPTER)
    assert step.num_tokens == found
    lengths = np.diff(step.query_starts)
    assert step.num_requests == len(lengths) == min(limits.max_num_seqs, asked)
    assert (lengths[: step.num_decodes] == 1).all() and (lengths[step.num_decodes :] > 1).all()
    assert (step.context_lens >= lengths).all() and (step.context_lens <= limits.max_model_len).all()
    assert step.context_lens.sum() < 1 << 20, "a start-up would take as long as the contexts"
    for r, (start, end) in enumerate(zip(step.query_starts[:-1], step.query_starts[1:], strict=True)):
        assert step.positions[start:end].tolist() == list(range(step.context_lens[r] - (end - start), step.context_lens[r]))
    assert (np.diff(step.page_starts) == -(-step.context_lens // PAGE_TOKENS)).all()
    assert step.page_starts[-1] == len(step.page_ids) and not step.page_ids.any()
    assert (step.slots < PAGE_TOKENS).all(), "only the first page of the pool is there"
    assert step.logits_rows.tolist() == (step.query_starts[1:] - 1).tolist()
    for name in ("token_ids", "positions", "slots", "query_starts", "context_lens", "page_starts", "page_ids", "logits_rows"):
        assert getattr(step, name).dtype == np.int32, name


class Greedy:
    """Needs 1 MiB for each row of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes: list[int] = []

    def num_rows(self, step: StepArrays) -> int:
        return step.num_tokens + 8

    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        assert pool.shape == (2, 2, GEOMETRY.page_elems) and inputs.host.adapters
        self.sizes.append(len(inputs.token_ids))
        torch.empty(len(inputs.token_ids) << 20, dtype=torch.uint8, device=self.device)
        return torch.zeros(len(inputs.logits_rows), 1000, device=self.device)


def test_steps_and_sampling_run_on_any_device() -> None:
    device = torch.device("cpu")
    model, limits = Greedy(device), StepLimits(token_budget=64, max_num_seqs=8, max_model_len=1 << 16, captured_rows=(1, 8, 1, 8))
    # Tensors are not counted there; each layer of a captured step has its fixed part.
    assert measure_step_bytes(model, Sampler(1000, (2,), 8, device), GEOMETRY, limits, device) == 4 * 2 * (256 << 10)
    assert model.sizes == [72, 16]


@pytest.mark.gpu
def test_the_measure_holds_the_largest_step_and_graphs_beside_it() -> None:
    device = torch.device("cuda")
    model = Greedy(device)
    sampler = Sampler(1000, (2,), 64, device)
    limits = StepLimits(token_budget=512, max_num_seqs=64, max_model_len=1 << 16)
    alone = measure_step_bytes(model, sampler, GEOMETRY, limits, device)
    assert model.sizes == [520]
    assert 520 << 20 <= alone <= 640 << 20
    graph_limits = StepLimits(token_budget=512, max_num_seqs=64, max_model_len=1 << 16, captured_rows=(1, 32, 64))
    with_graphs = measure_step_bytes(model, sampler, GEOMETRY, graph_limits, device)
    assert model.sizes == [520, 520, 72]
    assert 72 < (with_graphs - alone) >> 20 <= 128
