"""Truncation: the torch reference against plain Python, and the CUDA kernel against the reference, number for number."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.truncation import CudaTruncation, truncate_torch, truncation

needs_cupy = pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")


def _truncate_row(row: list[int], top_k: int, top_p: float) -> list[int]:
    order = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
    wanted = top_p * sum(row[i] for i in order)
    kept: set[int] = set()
    reached = 0
    for i in order:
        if reached < wanted or not kept:
            kept.add(i)
        reached += row[i]
    return [weight if i in kept else 0 for i, weight in enumerate(row)]


_weights = st.lists(st.integers(0, 5) | st.integers(0, 2**40), min_size=9, max_size=9)


@given(
    rows=st.lists(
        st.tuples(_weights, st.integers(1, 10), st.sampled_from([1e-300, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=4
    )
)
@settings(max_examples=200)
def test_the_reference_keeps_what_it_says(rows: list[tuple[list[int], int, float]]) -> None:
    weights = torch.tensor([row for row, _, _ in rows])
    truncate_torch(weights, torch.tensor([k for _, k, _ in rows]), torch.tensor([p for _, _, p in rows], dtype=torch.float64))
    assert weights.tolist() == [_truncate_row(*row) for row in rows]


def test_a_device_without_the_kernel_has_the_reference() -> None:
    assert truncation(torch.device("cpu")) is truncate_torch


# Rows by kind: far apart, with many equals, nearly all equal, of every magnitude, of one token, empty.
NUM_KINDS = 6


def _rows(kind: int, num_rows: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    bits = 62 - vocab_size.bit_length()
    shape = (num_rows, vocab_size)
    if kind == 0:
        return torch.randint(0, 2**bits, shape, generator=generator)
    if kind == 1:
        return (torch.randn(shape, generator=generator).mul(8).round().div(4).double().exp() * 2**30).long()
    if kind == 2:
        return torch.randint(0, 3, shape, generator=generator)
    if kind == 3:
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul(bits).exp2().long()
    return torch.nn.functional.one_hot(torch.arange(num_rows) % vocab_size, vocab_size) * (2**bits if kind == 4 else 0)


def _wrong_rows(truncate: CudaTruncation, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> list[int]:
    """Where the kernel gives other numbers than the reference."""
    expected, found = weights.clone(), weights.cuda()
    truncate_torch(expected, top_k, top_p)
    truncate(found, top_k.cuda(), top_p.cuda())
    rows: list[int] = (found.cpu() != expected).any(dim=1).nonzero().flatten().tolist()
    return rows


@pytest.mark.gpu
@needs_cupy
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 512, 1001, 32000, 128256])
def test_the_kernel_gives_the_numbers_of_the_reference(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    num_rows = 12
    truncate = CudaTruncation(torch.device("cuda"))
    for kind in range(NUM_KINDS):
        weights = _rows(kind, num_rows, vocab_size, generator)
        top_k = torch.randint(1, vocab_size + 1, (num_rows,), generator=generator)
        top_k[::3] = vocab_size
        top_k[1::6] = 1
        top_p = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        top_p[1::3] = 1.0
        top_p[2::6] = 1 - 2.0**-53
        top_p[3] = 1e-300
        assert not _wrong_rows(truncate, weights, top_k, top_p), f"kind {kind}"


# Of one launch each. A thread block takes 512 tokens at once where it clears and 2048 where it looks: less than a warp, a whole
# number of both, and some of each left over, with equals on either side of every bound.
@pytest.mark.gpu
@pytest.mark.sanitizer
@needs_cupy
@pytest.mark.parametrize("vocab_size", [1, 31, 2048, 4099])
def test_every_kind_of_row_is_cut_in_every_way(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    some, most = 1 + vocab_size // 3, max(1, vocab_size - 1)
    cuts = [(vocab_size, 1.0), (1, 1.0), (some, 1.0), (most, 1.0), (vocab_size, 1e-300), (vocab_size, 0.7), (some, 0.7)]
    weights = torch.cat([_rows(kind, len(cuts), vocab_size, generator) for kind in range(NUM_KINDS)])
    top_k = torch.tensor([k for k, _ in cuts] * NUM_KINDS)
    top_p = torch.tensor([p for _, p in cuts] * NUM_KINDS, dtype=torch.float64)
    wrong = _wrong_rows(CudaTruncation(torch.device("cuda")), weights, top_k, top_p)
    assert not wrong, [f"kind {row // len(cuts)}, top_k and top_p {cuts[row % len(cuts)]}" for row in wrong]
