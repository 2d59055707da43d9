"""The torch LoRA operation against a naive fp64 reference, with rows scattered over a pool of garbage."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from kernels.lora import LoraAdapter, LoraRows, LoraTarget
from kernels.lora_torch import TorchLoraOps

PAGE_ELEMS = 512
NUM_PAGES = 400
ALIGN_ELEMS = 8

QKV = (LoraTarget("q_proj", 48, 48, 0), LoraTarget("k_proj", 48, 17, 48), LoraTarget("v_proj", 48, 17, 65))
OUT_TOTAL = 90  # columns that no target writes are left over at the end

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Weights = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


class ScatteredPool:
    """A flat layer of NaN in which rows are placed at aligned starts of random pages."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.flat = torch.full((NUM_PAGES * PAGE_ELEMS,), torch.nan, dtype=dtype, device=device)
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._free = list(range(NUM_PAGES))

    def place(self, matrix: torch.Tensor) -> torch.Tensor:
        """Writes each row into a page of its own; returns the starts."""
        starts = []
        for row in matrix.to(self.flat):
            page = self._free.pop(self._random.randrange(len(self._free)))
            start = page * PAGE_ELEMS + ALIGN_ELEMS * self._random.randrange((PAGE_ELEMS - len(row)) // ALIGN_ELEMS)
            self.flat[start : start + len(row)] = row
            starts.append(start)
        return torch.tensor(starts, dtype=torch.int64, device=self.flat.device)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers that the pool's dtype holds exactly, on the CPU."""
        return torch.randn(*shape, generator=self._generator).to(self.flat.dtype)

    def adapter(self, ranks: dict[str, int]) -> tuple[LoraAdapter, Weights]:
        """An adapter with one rank per module; a module of rank 0 is left alone."""
        weights: Weights = {}
        modules = {}
        for i, target in enumerate(t for t in QKV if ranks.get(t.module)):
            rank = ranks[target.module]
            a, b_t = self.random(rank, target.in_features), self.random(rank, target.out_features)
            scaling = 0.25 + i
            weights[target.module] = (a, b_t, scaling)
            modules[target.module] = LoraRows(rank, scaling, self.place(a), self.place(b_t))
        return LoraAdapter(modules), weights


def reference(y: torch.Tensor, x: torch.Tensor, adapter_index: Sequence[int], weights: Sequence[Weights]) -> torch.Tensor:
    """y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], token by token in fp64."""
    out = y.double()
    for row, index in enumerate(adapter_index):
        for target in QKV if index >= 0 else ():
            if target.module in weights[index]:
                a, b_t, scaling = weights[index][target.module]
                delta = scaling * (x[row].double() @ a.double().T) @ b_t.double()
                out[row, target.out_start : target.out_start + target.out_features] += delta
    return out


RANKS = [
    {"q_proj": 1, "k_proj": 3, "v_proj": 7},
    {"q_proj": 64, "v_proj": 1},
    {"k_proj": 7},
    {},
]
BATCHES = {
    "one token": [0],
    "one token of the base": [-1],
    "all of one adapter": [1] * 5,
    "mixed": [0, -1, 2, 1, 0, -1, 3, 2, 1, 1],
    "base only": [-1] * 4,
    "no tokens": [],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "batch"), list(itertools.product(TOLERANCES, BATCHES)))
def test_each_token_gets_the_delta_of_its_own_adapter(dtype: torch.dtype, batch: str, device: str) -> None:
    pool = ScatteredPool(dtype, device, seed=len(batch))
    made = [pool.adapter(ranks) for ranks in RANKS]
    adapter_index = BATCHES[batch]
    x, y = pool.random(len(adapter_index), 48), pool.random(len(adapter_index), OUT_TOTAL)
    expected = reference(y, x, adapter_index, [weights for _, weights in made])
    ops = TorchLoraOps()
    out = y.to(device)
    ops.add(out, x.to(device), pool.flat, ops.plan(adapter_index, [adapter for adapter, _ in made]), QKV)
    scale = max(1.0, expected.abs().max().item() if len(adapter_index) else 1.0)
    torch.testing.assert_close(out.cpu().double() / scale, expected / scale, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_the_base_keep_every_bit(device: str) -> None:
    pool = ScatteredPool(torch.float32, device, seed=1)
    adapter, _ = pool.adapter({"q_proj": 3, "v_proj": 2})
    y = pool.random(4, OUT_TOTAL).to(device)
    y[0, 0], y[0, 1], y[0, 2] = -0.0, torch.inf, torch.nan
    before = y.clone()
    ops = TorchLoraOps()
    ops.add(y, pool.random(4, 48).to(device), pool.flat, ops.plan([-1, 0, -1, 0], [adapter]), QKV)
    for row in (0, 2):
        assert torch.equal(y[row].view(torch.int32), before[row].view(torch.int32))
    assert torch.equal(y[:, 48:65], before[:, 48:65])  # no k_proj in the adapter
    assert torch.equal(y[:, 82:], before[:, 82:])  # past the last target
    assert not torch.equal(y[1], before[1])


def test_a_token_does_not_depend_on_the_other_adapters_of_the_batch() -> None:
    pool = ScatteredPool(torch.float32, "cpu", seed=2)
    adapters = [pool.adapter(ranks)[0] for ranks in RANKS]
    x, y = pool.random(6, 48), pool.random(6, OUT_TOTAL)
    ops = TorchLoraOps()
    mixed, alone = y.clone(), y[2:4].clone()
    ops.add(mixed, x, pool.flat, ops.plan([0, 1, 2, 2, -1, 0], adapters), QKV)
    ops.add(alone, x[2:4], pool.flat, ops.plan([0, 0], adapters[2:3]), QKV)
    assert torch.equal(mixed[2:4], alone)


def test_a_plan_is_empty_exactly_when_no_token_has_anything_to_add() -> None:
    pool = ScatteredPool(torch.float32, "cpu", seed=3)
    adapter, _ = pool.adapter({"q_proj": 1})
    ops = TorchLoraOps()
    assert ops.plan([-1, -1], [adapter]).is_empty
    assert ops.plan([], []).is_empty
    assert ops.plan([0], [LoraAdapter({})]).is_empty
    assert not ops.plan([-1, 0], [adapter]).is_empty


def test_an_index_past_the_adapters_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"adapter_index\[1\] = 1, but the step has 1 adapters"):
        TorchLoraOps().plan([0, 1], [LoraAdapter({})])
