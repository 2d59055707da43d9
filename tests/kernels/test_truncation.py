"""Truncation: the torch reference against plain Python, and the CUDA kernel against the reference, number for number."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.truncation import CudaTruncation, truncate_torch, truncation


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


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
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
        expected, found = weights.clone(), weights.cuda()
        truncate_torch(expected, top_k, top_p)
        truncate(found, top_k.cuda(), top_p.cuda())
        assert torch.equal(found.cpu(), expected), f"kind {kind}"
