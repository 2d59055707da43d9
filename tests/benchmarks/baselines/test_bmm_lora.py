"""The padded batched product computes what the reference of the LoRA operation does, over a pool full of NaN."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from benchmarks.baselines.bmm_lora import MAX_SHORT_TOKENS, BmmLoraOps
from kernels.lora import LoraAdapter, LoraRows, LoraTarget
from kernels.lora_torch import TorchLoraOps
from kernels.plan_layout import LoraLimits

Group = tuple[LoraTarget, ...]

# Rows of the first can be copied in wide elements, those of the second cannot.
GROUPS: dict[str, tuple[Group, ...]] = {
    "even": ((LoraTarget("q_proj", 48, 48, 0), LoraTarget("v_proj", 48, 16, 48)), (LoraTarget("o_proj", 48, 24, 0),)),
    "odd": ((LoraTarget("q_proj", 31, 17, 0), LoraTarget("v_proj", 31, 5, 17)), (LoraTarget("o_proj", 17, 31, 0),)),
}
MAX_RANK = 8
LIMITS = LoraLimits(max_tokens=128, max_requests=6, max_rank=MAX_RANK)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_ADAPTERS = 5

Ranks = dict[str, int]


@dataclass(frozen=True)
class Step:
    """ranks: of each adapter, by module. adapter_index: of each token. Padding rows follow the tokens."""

    ranks: list[Ranks]
    adapter_index: list[int]
    num_padding_rows: int


steps = st.builds(
    Step,
    ranks=st.lists(
        st.fixed_dictionaries({}, optional={name: st.integers(1, MAX_RANK) for name in ("q_proj", "v_proj", "o_proj")}),
        min_size=NUM_ADAPTERS,
        max_size=NUM_ADAPTERS,
    ),
    # Runs, so that segments longer than MAX_SHORT_TOKENS come up; shuffled below.
    adapter_index=st.lists(st.tuples(st.integers(-1, NUM_ADAPTERS - 1), st.integers(1, 2 * MAX_SHORT_TOKENS)), max_size=6).map(
        lambda runs: [index for index, length in runs for _ in range(length)]
    ),
    num_padding_rows=st.integers(0, 3),
)


class Pool:
    """A flat layer of NaN with rows at random aligned starts."""

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, device: str) -> None:
        self.targets = [target for group in groups for target in group]
        self.flat = torch.full((1 << 15,), torch.nan, dtype=dtype, device=device)
        self._end = 8

    def adapter(self, ranks: Ranks) -> LoraAdapter:
        modules = {}
        for target in self.targets:
            rank = ranks.get(target.module, 0)
            if rank:
                lora_a, lora_b = self._rows(rank, target.in_features), self._rows(rank, target.out_features)
                modules[target.module] = LoraRows(rank, 0.5 + 0.25 * rank, lora_a, lora_b)
        return LoraAdapter(modules)

    def _rows(self, rank: int, length: int) -> torch.Tensor:
        starts = []
        for _ in range(rank):
            self.flat[self._end : self._end + length] = torch.randn(length)
            starts.append(self._end)
            self._end += 8 * -(-(length + 1) // 8)
        assert self._end <= len(self.flat)
        random.shuffle(starts)
        return torch.tensor(starts, device=self.flat.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", GROUPS)
@hypothesis.given(steps=st.lists(steps, min_size=1, max_size=2), seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=30)
def test_padding_to_one_shape_changes_nothing(shape: str, dtype: torch.dtype, device: str, steps: list[Step], seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    ops, reference = BmmLoraOps(GROUPS[shape], dtype, torch.device(device), LIMITS), TorchLoraOps()
    for step in steps:  # the tables know the adapters of the first step in the second
        pool = Pool(GROUPS[shape], dtype, device)
        adapters = [pool.adapter(ranks) for ranks in step.ranks]
        index = random.sample(step.adapter_index, len(step.adapter_index))
        plan, expected_plan = ops.plan(index, adapters), reference.plan(index, adapters)
        assert plan.is_empty == expected_plan.is_empty
        for group in GROUPS[shape]:
            num_rows = len(index) + step.num_padding_rows
            x = torch.randn(num_rows, group[0].in_features).to(pool.flat)
            y = torch.randn(num_rows, group[-1].out_start + group[-1].out_features + 3).to(pool.flat)
            expected = y.clone()
            reference.add(expected, x, pool.flat, expected_plan, group)
            untouched = [row for row in range(num_rows) if row >= len(index) or index[row] < 0]
            before = y[untouched].clone()
            ops.add(y, x, pool.flat, plan, group)
            scale = max(1.0, expected.abs().max().item() if num_rows else 1.0)
            torch.testing.assert_close(y / scale, expected / scale, atol=TOLERANCES[dtype], rtol=0)
            assert torch.equal(y[untouched], before)
            assert plan.changes(group) == expected_plan.changes(group)


def test_adapters_past_the_size_of_the_tables_take_the_places_of_earlier_ones() -> None:
    torch.manual_seed(0)
    groups = GROUPS["even"]
    ops, pool = BmmLoraOps(groups, torch.float32, torch.device("cpu"), LIMITS), Pool(groups, torch.float32, "cpu")
    adapters = [pool.adapter({"o_proj": 1}) for _ in range(8 * LIMITS.max_requests + 5)]
    x = torch.randn(2, 48)
    for first in (*range(len(adapters) - 1), 0):
        y, expected = torch.zeros(2, 24), torch.zeros(2, 24)
        pair = adapters[first : first + 2]
        ops.add(y, x, pool.flat, ops.plan([1, 0], pair), groups[1])
        reference = TorchLoraOps()
        reference.add(expected, x, pool.flat, reference.plan([1, 0], pair), groups[1])
        torch.testing.assert_close(y, expected)
