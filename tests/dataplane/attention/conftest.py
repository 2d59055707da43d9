"""Steps as attention sees them: requests over page tables, packed and brought to the device."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, takewhile

import numpy as np
import pytest
import torch

from dataplane.attention.interface import AttentionBackend, KvPages
from dataplane.model.step_inputs import Ints, StepArrays, StepInputs
from dataplane.runner.step_buffers import StepBuffers


def ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), dtype=np.int32)


def make_inputs(
    requests: Sequence[tuple[int, int]],
    tables: Sequence[Sequence[int]],
    page_tokens: int,
    device: str | torch.device,
    num_padding: int = 0,
    padding_page: int = 0,
) -> StepInputs:
    """A step of requests given by (tokens in KV once the step's are written, rows of the step), with rows of padding behind."""
    rows = [(r, position) for r, (length, n) in enumerate(requests) for position in range(length - n, length)]
    step = StepArrays(
        token_ids=ints(0 for _ in rows),
        positions=ints(position for _, position in rows),
        slots=ints(tables[r][p // page_tokens] * page_tokens + p % page_tokens for r, p in rows),
        query_starts=ints([0, *accumulate(n for _, n in requests)]),
        context_lens=ints(length for length, _ in requests),
        page_starts=ints([0, *accumulate(len(table) for table in tables)]),
        page_ids=ints(page for table in tables for page in table),
        logits_rows=ints([]),
        adapter_index=ints(-1 for _ in rows),
        adapters=(),
        num_decodes=len(list(takewhile(lambda request: request[1] == 1, requests))),
    )
    num_rows = len(rows) + num_padding
    return StepBuffers(num_rows, page_tokens, padding_page, torch.device(device)).upload(step, num_rows)


def run_attention(
    backend: AttentionBackend,
    inputs: StepInputs,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pool: torch.Tensor,
    *windows: int | None,
) -> list[torch.Tensor]:
    """Appends k and v, then attends once for each window under one plan. tensors: q, k, v. pool: [pages, 2, ...] one layer."""
    q, k, v = tensors
    pages = KvPages(pool[:, 0], pool[:, 1])
    out = torch.full_like(q, torch.nan)
    plan = backend.plan(inputs, q, out)
    backend.append(k, v, pages, inputs)
    results = []
    for window in windows:
        backend.attend(plan, pages, window)
        results.append(out.clone())
        out.fill_(torch.nan)
    return results


@pytest.fixture
def step_inputs() -> Callable[..., StepInputs]:
    """Packs a step."""
    return make_inputs


@pytest.fixture
def attention() -> Callable[..., list[torch.Tensor]]:
    """Runs a backend on a step."""
    return run_attention
