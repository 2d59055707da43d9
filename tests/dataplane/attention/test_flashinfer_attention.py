"""FlashInfer's attention against the torch backend in fp32, over scattered pages whose unwritten slots hold NaN."""

import random

import pytest
import torch

from dataplane.attention.choice import attention_backend, why_torch_attention
from dataplane.attention.flashinfer_attention import FlashInferAttention
from dataplane.attention.interface import AttentionBackend, AttentionShape
from dataplane.attention.torch_attention import TorchAttention
from dataplane.model.step_inputs import StepInputs

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


class Step:
    """A step over requests whose earlier tokens already lie in scattered pages of a pool that is NaN elsewhere."""

    def __init__(self, requests: list[tuple[int, int]], shape: AttentionShape, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape = shape
        generator = torch.Generator("cuda").manual_seed(seed)
        size = shape.page_tokens
        num_pages = sum(-(-context_len // size) for context_len, _ in requests) + 5
        free = random.Random(seed).sample(range(num_pages), num_pages)
        heads = (shape.num_kv_heads, shape.head_dim)
        self.pool = torch.full((num_pages, 2, size, *heads), torch.nan, dtype=dtype, device="cuda")
        tables, starts, slots, new = [], [0], [], []
        positions: list[int] = []
        for context_len, num_rows in requests:
            table = tuple(free.pop() for _ in range(-(-context_len // size)))
            at = torch.tensor([table[i // size] * size + i % size for i in range(context_len)], device="cuda")
            kv = torch.randn((context_len, 2, *heads), generator=generator, device="cuda").to(dtype)
            first = context_len - num_rows
            self.pool[at[:first] // size, :, at[:first] % size] = kv[:first]
            tables.append(table)
            starts.append(starts[-1] + num_rows)
            slots.append(at[first:])
            positions += range(first, context_len)
            new.append(kv[first:])
        self.k, self.v = torch.cat(new).unbind(1)
        q = torch.randn((starts[-1], shape.num_heads, shape.head_dim), generator=generator, device="cuda")
        self.q = (2 * q).to(dtype)
        tokens = torch.zeros(starts[-1], dtype=torch.int64, device="cuda")
        lens = tuple(context_len for context_len, _ in requests)
        at_positions = torch.tensor(positions, device="cuda")
        none = (-1,) * starts[-1]
        self.inputs = StepInputs(tokens, at_positions, torch.cat(slots), tuple(starts), lens, tuple(tables), tokens[:0], none, ())

    def run(self, backend: AttentionBackend, window: int | None) -> torch.Tensor:
        """The backend's output; the step's K and V are in the pool afterwards."""
        return backend.run(self.q, self.k, self.v, self.pool, backend.plan(self.inputs), window)

    def expected(self, window: int | None) -> torch.Tensor:
        """Of the torch backend in fp32 over the same values."""
        backend = TorchAttention(self.shape.page_tokens)
        wide = (self.q.float(), self.k.float(), self.v.float(), self.pool.float())
        return backend.run(*wide, backend.plan(self.inputs), window)


def make(
    num_heads: int, num_kv_heads: int, head_dim: int, page_tokens: int, window: int | None, dtype: torch.dtype
) -> tuple[AttentionShape, AttentionBackend]:
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, page_tokens, frozenset({window}))
    reason = why_torch_attention(shape, dtype, torch.device("cuda"))
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
    num_heads: int, num_kv_heads: int, head_dim: int, page_tokens: int, window: int | None, dtype: torch.dtype
) -> None:
    shape, backend = make(num_heads, num_kv_heads, head_dim, page_tokens, window, dtype)
    for seed, (name, requests) in enumerate(STEPS.items()):
        step = Step(requests, shape, dtype, seed)
        expected = step.expected(window)
        found = step.run(backend, window)
        assert torch.isfinite(found).all(), name
        assert_close(found, expected)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2)])
def test_long_contexts_agree_whether_split_or_not(num_heads: int, num_kv_heads: int) -> None:
    shape, backend = make(num_heads, num_kv_heads, 64, 16, None, torch.bfloat16)
    for requests in ([(20001, 1)], [(9000, 1)] * 40, [(12000, 1), (9000, 600)]):
        step = Step(requests, shape, torch.bfloat16)
        expected = step.expected(None)
        assert_close(step.run(backend, None), expected)


def test_layers_of_several_windows_share_a_plan() -> None:
    windows: frozenset[int | None] = frozenset({None, 24})
    make(4, 2, 64, 16, None, torch.bfloat16)
    shape = AttentionShape(4, 2, 64, 16, windows)
    backend = attention_backend(shape, torch.bfloat16, torch.device("cuda"))
    step = Step(STEPS["mixed"], shape, torch.bfloat16)
    plan = backend.plan(step.inputs)
    for window in (None, 24, None):
        expected = step.expected(window)
        assert_close(backend.run(step.q, step.k, step.v, step.pool, plan, window), expected)


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    shape, backend = make(8, 2, 64, 32, None, torch.bfloat16)
    step = Step(STEPS["mixed"], shape, torch.bfloat16)
    expected = step.pool.clone()
    slots = step.inputs.slots
    expected[slots // 32, 0, slots % 32] = step.k
    expected[slots // 32, 1, slots % 32] = step.v
    step.run(backend, None)
    assert torch.equal(step.pool.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (8, 1)])
def test_a_window_leaves_pages_before_it_unread(num_heads: int, num_kv_heads: int) -> None:
    shape, backend = make(num_heads, num_kv_heads, 64, 16, 24, torch.bfloat16)
    step = Step([(100, 1), (100, 2)], shape, torch.bfloat16)
    expected = step.expected(24)
    for table in step.inputs.page_tables:
        step.pool[list(table[:4])] = torch.nan
    assert_close(step.run(backend, 24), expected)


def test_a_plan_ends_with_the_next_one() -> None:
    shape, backend = make(4, 2, 64, 16, None, torch.bfloat16)
    step = Step([(5, 1)], shape, torch.bfloat16)
    stale = backend.plan(step.inputs)
    backend.plan(step.inputs)
    with pytest.raises(AssertionError, match="until the next one"):
        backend.run(step.q, step.k, step.v, step.pool, stale, None)
