"""FlashInfer's attention against the torch backend in fp32, over scattered pages whose unwritten slots hold NaN."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dataplane.attention.choice import attention_backend
from dataplane.attention.flashinfer_attention import FlashInferAttention
from dataplane.attention.interface import AttentionBackend, AttentionShape, KvPages
from dataplane.attention.torch_attention import TorchAttention
from dataplane.flashinfer_library import why_no_flashinfer

pytestmark = pytest.mark.gpu

# Outputs are averages of normal values; probabilities and results are rounded to the dtype.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

# (tokens in KV once the step's are written, rows of the step): decodes first, as steps are packed.
DECODES = [(1, 1), (16, 1), (17, 1), (33, 1), (50, 1), (50, 1), (64, 1), (65, 1), (700, 1)]
CHUNKS = [(1, 1), (16, 16), (17, 17), (40, 7), (130, 130), (64, 2), (300, 33), (700, 257)]
STEPS = {
    "decodes": DECODES,
    "chunks": CHUNKS,
    "mixed": DECODES + CHUNKS,
    "out of order": CHUNKS[1:5] + DECODES + [(5, 5)],
    "one token": [(1, 1)],
    "one decode": [(31, 1)],
}


@dataclass(frozen=True)
class Tools:
    """What packs steps and runs backends."""

    step_inputs: Callable[..., Any]
    attention: Callable[..., list[torch.Tensor]]


@pytest.fixture
def tools(step_inputs: Callable[..., Any], attention: Callable[..., list[torch.Tensor]]) -> Tools:
    """Both."""
    return Tools(step_inputs, attention)


class Step:
    """A step over requests whose earlier tokens already lie in scattered pages of a pool that is NaN elsewhere.

    The last page of the pool is the padding's; rows of padding have other values than anybody's.
    """

    def __init__(
        self,
        tools: Tools,
        requests: list[tuple[int, int]],
        shape: AttentionShape,
        dtype: torch.dtype,
        seed: int = 0,
        num_padding: int = 0,
    ) -> None:
        self.shape = shape
        self._attention = tools.attention
        generator = torch.Generator("cuda").manual_seed(seed)
        size = shape.page_tokens
        num_pages = sum(-(-context_len // size) for context_len, _ in requests) + 5
        free = random.Random(seed).sample(range(num_pages), num_pages)
        heads = (shape.num_kv_heads, shape.head_dim)
        self.padding_page = num_pages
        self.pool = torch.full((num_pages + 1, 2, size, *heads), torch.nan, dtype=dtype, device="cuda")
        self.tables, new = [], []
        for context_len, num_rows in requests:
            table = tuple(free.pop() for _ in range(-(-context_len // size)))
            at = torch.tensor([table[i // size] * size + i % size for i in range(context_len)], device="cuda")
            kv = torch.randn((context_len, 2, *heads), generator=generator, device="cuda").to(dtype)
            first = context_len - num_rows
            self.pool[at[:first] // size, :, at[:first] % size] = kv[:first]
            self.tables.append(table)
            new.append(kv[first:])
        new.append(torch.full((num_padding, 2, *heads), 1e4, dtype=dtype, device="cuda"))
        self.k, self.v = torch.cat(new).unbind(1)
        self.num_tokens = len(self.k) - num_padding
        q = torch.randn((len(self.k), shape.num_heads, shape.head_dim), generator=generator, device="cuda")
        self.q = (2 * q).to(dtype)
        self.inputs = tools.step_inputs(requests, self.tables, size, "cuda", num_padding, self.padding_page)

    def run(self, backend: AttentionBackend, window: int | None) -> torch.Tensor:
        """The backend's output; the step's K and V are in the pool afterwards."""
        return self.run_windows(backend, window)[0]

    def run_windows(self, backend: AttentionBackend, *windows: int | None) -> list[torch.Tensor]:
        """Several outputs under one plan."""
        tensors = (self.q, self.k, self.v)
        return [out[: self.num_tokens] for out in self._attention(backend, self.inputs, tensors, self.pool, *windows)]

    def expected(self, window: int | None) -> torch.Tensor:
        """Of the torch backend in fp32 over the same values."""
        wide = (self.q.float(), self.k.float(), self.v.float())
        backend = TorchAttention(self.shape.page_tokens)
        return self._attention(backend, self.inputs, wide, self.pool.float(), window)[0][: self.num_tokens]


def make(
    num_heads: int, num_kv_heads: int, head_dim: int, page_tokens: int, window: int | None, dtype: torch.dtype
) -> tuple[AttentionShape, AttentionBackend]:
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, page_tokens, frozenset({window}))
    reason = why_no_flashinfer(head_dim, dtype, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    backend = attention_backend(shape, dtype, torch.device("cuda"))
    assert isinstance(backend, FlashInferAttention)
    return shape, backend


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


# (heads, KV heads, head size, page, window, dtype): every ratio and page once, every window with both decode kernels.
RATIOS = [(4, 4, 16), (8, 4, 32), (6, 2, 16), (8, 2, 64), (7, 1, 16), (16, 2, 16), (20, 1, 128)]
GRID = [
    *((heads, kv_heads, 64, page_tokens, None, torch.bfloat16) for heads, kv_heads, page_tokens in RATIOS),
    *((*heads, 64, 16, window, torch.bfloat16) for heads in ((4, 2), (8, 1)) for window in (1, 5, 16, 24, 130, 5000)),
    (4, 4, 128, 16, None, torch.bfloat16),
    (8, 2, 128, 16, None, torch.bfloat16),
    (4, 2, 256, 16, None, torch.bfloat16),
    (4, 2, 64, 16, None, torch.float16),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "page_tokens", "window", "dtype"), GRID)
def test_every_step_agrees_with_torch_in_fp32(
    num_heads: int, num_kv_heads: int, head_dim: int, page_tokens: int, window: int | None, dtype: torch.dtype, tools: Tools
) -> None:
    shape, backend = make(num_heads, num_kv_heads, head_dim, page_tokens, window, dtype)
    for seed, (name, requests) in enumerate(STEPS.items()):
        step = Step(tools, requests, shape, dtype, seed, num_padding=3 * (seed % 2))
        expected = step.expected(window)
        found = step.run(backend, window)
        assert torch.isfinite(found).all(), name
        assert_close(found, expected)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2)])
def test_long_contexts_agree_whether_split_or_not(num_heads: int, num_kv_heads: int, tools: Tools) -> None:
    shape, backend = make(num_heads, num_kv_heads, 64, 16, None, torch.bfloat16)
    for requests in ([(20001, 1)], [(9000, 1)] * 40, [(12000, 1), (9000, 600)]):
        step = Step(tools, requests, shape, torch.bfloat16)
        expected = step.expected(None)
        assert_close(step.run(backend, None), expected)


def test_layers_of_several_windows_share_a_plan(tools: Tools) -> None:
    windows: frozenset[int | None] = frozenset({None, 24})
    make(4, 2, 64, 16, None, torch.bfloat16)
    shape = AttentionShape(4, 2, 64, 16, windows)
    backend = attention_backend(shape, torch.bfloat16, torch.device("cuda"))
    step = Step(tools, STEPS["mixed"], shape, torch.bfloat16)
    expected = [step.expected(window) for window in (None, 24, None)]
    for found, wanted in zip(step.run_windows(backend, None, 24, None), expected, strict=True):
        assert_close(found, wanted)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else(tools: Tools) -> None:
    shape, backend = make(8, 2, 64, 32, None, torch.bfloat16)
    step = Step(tools, STEPS["mixed"], shape, torch.bfloat16, num_padding=7)
    expected = step.pool.clone()
    slots = torch.from_numpy(step.inputs.host.slots).cuda().long()
    expected[slots // 32, 0, slots % 32] = step.k[: step.num_tokens]
    expected[slots // 32, 1, slots % 32] = step.v[: step.num_tokens]
    expected[step.padding_page, :, 0] = 1e4
    step.run(backend, None)
    assert torch.equal(bits(step.pool), bits(expected))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (8, 1)])
def test_a_window_leaves_pages_before_it_unread(num_heads: int, num_kv_heads: int, tools: Tools) -> None:
    shape, backend = make(num_heads, num_kv_heads, 64, 16, 24, torch.bfloat16)
    step = Step(tools, [(100, 1), (100, 2)], shape, torch.bfloat16)
    expected = step.expected(24)
    for table in step.tables:
        step.pool[list(table[:4])] = torch.nan
    assert_close(step.run(backend, 24), expected)


def test_a_plan_ends_with_the_next_one(tools: Tools) -> None:
    shape, backend = make(4, 2, 64, 16, None, torch.bfloat16)
    step = Step(tools, [(5, 1)], shape, torch.bfloat16)
    out = torch.empty_like(step.q)
    stale = backend.plan(step.inputs, step.q, out)
    backend.plan(step.inputs, step.q, out)
    with pytest.raises(AssertionError, match="until the next one"):
        backend.attend(stale, KvPages(step.pool[:, 0], step.pool[:, 1]), None)


# Kernels without and with tensor cores; split calls (few rows) and whole ones (many). And as many heads as real models have, of
# groups whose tiles have 16 and 64 rows: what split calls leave takes the most room.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"),
    [(4, 4, 64, None), (4, 4, 64, 24), (8, 2, 64, None), (8, 2, 64, 24), (32, 8, 128, None), (40, 2, 128, None)],
)
@pytest.mark.parametrize("num_rows", [8, 400])
def test_one_graph_serves_every_step_of_as_many_rows(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, num_rows: int, tools: Tools
) -> None:
    shape, eager = make(num_heads, num_kv_heads, head_dim, 16, window, torch.bfloat16)
    chooser = random.Random(num_rows)
    batches = [
        [(chooser.choice([1, 16, 17, 100, 900]), 1) for _ in range(n)] for n in (1, num_rows, num_rows // 2 + 1, num_rows - 1)
    ]
    steps = [Step(tools, batch, shape, torch.bfloat16, i, num_rows - len(batch)) for i, batch in enumerate(batches)]
    num_pages = max(len(step.pool) for step in steps)
    pool = torch.full((num_pages, *steps[0].pool.shape[1:]), torch.nan, dtype=torch.bfloat16, device="cuda")
    pages = KvPages(pool[:, 0], pool[:, 1])
    backend = eager.for_decode_graphs(num_rows, 64 * num_rows, padding_page=num_pages - 1)
    q, out = torch.zeros_like(steps[0].q), torch.zeros_like(steps[0].q)
    k, v = torch.zeros_like(steps[0].k), torch.zeros_like(steps[0].k)
    inputs = steps[0].inputs
    plan = backend.plan(inputs, q, out)
    pool[-1] = 0
    backend.attend(plan, pages, window)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.append(k, v, pages, inputs)
        backend.attend(plan, pages, window)
    for step in steps:
        expected = step.expected(window)
        pool[: len(step.pool) - 1] = step.pool[:-1]
        for to, of in ((q, step.q), (k, step.k), (v, step.v)):
            to.copy_(of)
        inputs.slot_pages.copy_(step.inputs.slot_pages.where(step.inputs.slot_pages < step.padding_page, num_pages - 1))
        inputs.slot_offsets.copy_(step.inputs.slot_offsets)
        backend.plan(step.inputs, q, out)
        graph.replay()
        replayed = out[: step.num_tokens].clone()
        assert_close(replayed, expected)
        # The same launches outside of the graph.
        out.fill_(torch.nan)
        backend.attend(backend.plan(step.inputs, q, out), pages, window)
        assert torch.equal(bits(out[: step.num_tokens]), bits(replayed))
