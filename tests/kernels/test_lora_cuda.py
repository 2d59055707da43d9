"""The CUDA LoRA operation against an fp64 reference: tokens, adapters, ranks, widths, modules, graphs. Needs a GPU."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from kernels.backend import lora_ops
from kernels.lora import LoraAdapter, LoraLaunches, LoraOps, LoraPlan, LoraRows, LoraTarget
from kernels.lora_cuda import CudaLoraOps
from kernels.lora_torch import TorchLoraOps
from kernels.plan_layout import LoraLimits

pytestmark = pytest.mark.gpu

Group = tuple[LoraTarget, ...]

LIMITS = LoraLimits(max_tokens=512, max_requests=128, max_rank=256)
# MBGMM computes every segment of 5 tokens or more, else only those of steps larger than these tests have.
MBGMM_FOR_FEW = replace(LIMITS, vector_work=0, vector_tokens=4)
# Relative error of the whole output, where the delta is larger than y: rounding y to its dtype dominates.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 6e-4}

# Sizes off every tile; a group whose modules have different widths; an input longer than its slices.
SMALL: tuple[Group, ...] = (
    (LoraTarget("q_proj", 264, 136, 0), LoraTarget("k_proj", 264, 72, 136), LoraTarget("v_proj", 264, 8, 208)),
    (LoraTarget("o_proj", 136, 264, 0),),
)
LARGE: tuple[Group, ...] = (
    (LoraTarget("gate_proj", 2048, 1408, 0), LoraTarget("up_proj", 2048, 1408, 1408)),
    (LoraTarget("down_proj", 5504, 520, 0),),
)
SHAPES = {"small": SMALL, "large": LARGE}

BATCHES: dict[str, list[int]] = {
    "one token": [0],
    "one token of the base": [-1],
    "no tokens": [],
    "one token each": [0, 1, 2, 3, 4],
    "mixed": [0, 1, 2, 3, -1, 3, 2, 1, 0, 4, 4, 4, -1],
    "whole tiles": [0] * 16 + [1] * 8 + [-1] * 4,
    "off the tile": [3, 0, 1] * 9 + [2] * 13 + [-1, 4],
    "many of one": [2] * 129,
    "many and few": [0] * 200 + [1] * 33 + [-1] * 3 + [2] * 5 + [4] * 17 + [3],
}
RANKS = {"mixed": [1, 3, 7, 64, 16], "wide": [256, 200, 8, 33, 17], "some modules": [5, 0, 12, 0, 24]}


class Pool:
    """A layer of NaN in which rows of random weights lie at random aligned starts."""

    def __init__(self, groups: Sequence[Group], ranks: Sequence[int], dtype: torch.dtype, seed: int = 0) -> None:
        targets = [target for group in groups for target in group]
        self._random = random.Random(seed)
        torch.manual_seed(seed)
        rows = [(t.in_features, t.out_features) for rank in ranks for t in targets for _ in range(max(rank, 5))]
        self._free = sum(a + b for a, b in rows) + 16 * len(rows) + 64
        self.flat = torch.full((self._free,), torch.nan, dtype=dtype, device="cuda")
        self._end = 8  # the first row does not lie at the start
        self.adapters = [self._adapter(targets, rank, i) for i, rank in enumerate(ranks)]

    def _adapter(self, targets: Sequence[LoraTarget], rank: int, number: int) -> LoraAdapter:
        """Ranks differ between modules, and rank 0 stands for 5 in every second one."""
        modules = {}
        for i, target in enumerate(targets):
            module_rank = max(1, rank - (i + number) % 3) if rank else 5 * ((i + number) % 2)
            if module_rank:
                a, b = self._rows(module_rank, target.in_features), self._rows(module_rank, target.out_features)
                modules[target.module] = LoraRows(module_rank, 0.5 + 0.25 * i, a, b)
        return LoraAdapter(modules)

    def _rows(self, rank: int, length: int) -> torch.Tensor:
        starts = []
        for _ in range(rank):
            start = self._end + 8 * self._random.randrange(2)
            assert start + length <= len(self.flat)
            self.flat[start : start + length].normal_(std=0.1)
            starts.append(start)
            self._end = start + -(-length // 8) * 8
        self._random.shuffle(starts)
        return torch.tensor(starts, dtype=torch.int64, device="cuda")


def reference(y: torch.Tensor, x: torch.Tensor, pool: Pool, adapter_index: Sequence[int], group: Group) -> torch.Tensor:
    """y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], in fp64."""
    out = y.double()
    for number in {index for index in adapter_index if index >= 0}:
        tokens = torch.tensor([t for t, index in enumerate(adapter_index) if index == number], device="cuda")
        for target in group:
            rows = pool.adapters[number].modules.get(target.module)
            if rows is not None:
                a = pool.flat.unfold(0, target.in_features, 1)[rows.a_rows].double()
                b_t = pool.flat.unfold(0, target.out_features, 1)[rows.b_rows].double()
                columns = slice(target.out_start, target.out_start + target.out_features)
                out[tokens, columns] += rows.scaling * (x[tokens].double() @ a.T) @ b_t
    return out


@dataclass(frozen=True)
class Tensors:
    """Inputs and outputs of one group. x and y are cut from wider tensors, of which y's margin must never change."""

    x: torch.Tensor
    y: torch.Tensor
    y_with_margin: torch.Tensor

    @staticmethod
    def random(group: Group, num_tokens: int, dtype: torch.dtype) -> "Tensors":
        width = max(target.out_start + target.out_features for target in group)
        x = torch.randn(num_tokens, group[0].in_features + 16, device="cuda").to(dtype)
        y = torch.randn(num_tokens + 2, width + 8, device="cuda").to(dtype)
        return Tensors(x[:, 8:-8], y[1:-1, :width], y)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def add(ops: LoraOps, plan: LoraPlan, pool: Pool, tensors: Tensors, group: Group) -> None:
    ops.add(tensors.y, tensors.x, pool.flat, plan, group)


@pytest.mark.parametrize("launches", LoraLaunches)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("shape", "ranks"), list(itertools.product(SHAPES, RANKS)))
def test_each_token_gets_the_delta_of_its_own_adapter(shape: str, ranks: str, dtype: torch.dtype, launches: LoraLaunches) -> None:
    groups = SHAPES[shape]
    pool = Pool(groups, RANKS[ranks], dtype)
    limits = MBGMM_FOR_FEW if launches is LoraLaunches.MIXED else LIMITS
    ops = lora_ops(groups, dtype, torch.device("cuda"), limits)
    for name, adapter_index in BATCHES.items():
        if launches is LoraLaunches.DECODE and len(adapter_index) > LIMITS.max_requests:
            continue
        # The second round meets the products of the first one, and must not take them for its own.
        plan = ops.plan(adapter_index, pool.adapters, launches)
        ops.begin(plan)
        for _, group in itertools.product(range(2), groups):
            tensors = Tensors.random(group, len(adapter_index), dtype)
            expected = reference(tensors.y, tensors.x, pool, adapter_index, group)
            before = tensors.y_with_margin.clone()
            add(ops, plan, pool, tensors, group)
            error = (tensors.y.double() - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error.item() < TOLERANCES[dtype], (name, group[0].module, error.item())
            untouched = [row for row, index in enumerate([-1, *adapter_index, -1]) if index < 0]
            assert torch.equal(bits(tensors.y_with_margin[untouched]), bits(before[untouched])), name
            width = tensors.y.shape[1]
            assert torch.equal(bits(tensors.y_with_margin[:, width:]), bits(before[:, width:])), name


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_products_between_shrink_and_expand_may_be_beyond_the_range_of_the_dtype(dtype: torch.dtype) -> None:
    """Neighbouring tokens whose x A^T is far above 65,504, and some that is small: by MBGMM, in a tile of MBGMV, and alone."""
    pool = Pool(LARGE, [40, 33, 16], dtype)
    pool.adapters = [
        LoraAdapter({module: replace(rows, scaling=rows.scaling / 16) for module, rows in adapter.modules.items()})
        for adapter in pool.adapters
    ]
    adapter_index = [0] * 70 + [1] * 4 + [2, -1]
    exponents = torch.tensor([14, -8, 3, 14, 14, -2] * 13, device="cuda")[: len(adapter_index), None]
    ops = lora_ops(LARGE, dtype, torch.device("cuda"), MBGMM_FOR_FEW)
    plan = ops.plan(adapter_index, pool.adapters)
    ops.begin(plan)
    for group in LARGE:
        tensors = Tensors.random(group, len(adapter_index), dtype)
        tensors.x.clamp_(-3, 3).mul_(2.0**exponents)
        tensors.y.zero_()
        expected = reference(tensors.y, tensors.x, pool, adapter_index, group)
        add(ops, plan, pool, tensors, group)
        errors = (tensors.y.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)
        assert (errors < TOLERANCES[dtype]).all(), errors


def test_base_tokens_and_absent_modules_keep_every_bit() -> None:
    pool = Pool(SMALL, [16], torch.bfloat16)
    only_v = LoraAdapter({"v_proj": pool.adapters[0].modules["v_proj"]})
    ops = lora_ops(SMALL, torch.bfloat16, torch.device("cuda"), LIMITS)
    tensors = Tensors.random(SMALL[0], 40, torch.bfloat16)
    tensors.y[0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    before = tensors.y.clone()
    plan = ops.plan([-1] * 20 + [0] * 20, [only_v])
    ops.begin(plan)
    add(ops, plan, pool, tensors, SMALL[0])
    assert torch.equal(bits(tensors.y[:20]), bits(before[:20]))
    assert torch.equal(bits(tensors.y[:, :208]), bits(before[:, :208]))
    assert not torch.equal(tensors.y[20:], before[20:])


def random_batch(chooser: random.Random, num_rows: int, num_adapters: int, launches: LoraLaunches) -> list[int]:
    """Fewer tokens than rows; for MIXED, long runs of one adapter among them."""
    batch: list[int] = []
    while len(batch) < num_rows // 2:
        length = chooser.choice([1, 1, 2, 40]) if launches is LoraLaunches.MIXED else 1
        batch += [chooser.randrange(-1, num_adapters)] * length
    return batch[: num_rows - 3]


@pytest.mark.parametrize(
    ("shape", "launches", "num_adapters_of_steps"),
    [
        ("large", LoraLaunches.DECODE, (0, 1, 2, 5, 5)),
        ("large", LoraLaunches.MIXED, (0, 1, 2, 5, 5)),
        # A step for MBGMV alone, then one for both.
        pytest.param("small", LoraLaunches.MIXED, (2, 5), marks=pytest.mark.sanitizer),
    ],
    ids=str,
)
def test_one_graph_serves_every_plan_of_its_kind_bit_for_bit(
    shape: str, launches: LoraLaunches, num_adapters_of_steps: tuple[int, ...]
) -> None:
    groups = SHAPES[shape]
    dtype, num_rows = torch.bfloat16, 72
    pool = Pool(groups, [16, 5, 64, 33, 8], dtype)
    ops = lora_ops(groups, dtype, torch.device("cuda"), MBGMM_FOR_FEW)
    tensors = [Tensors.random(group, num_rows, dtype) for group in groups]
    originals = [t.y.clone() for t in tensors]

    def step(plan: LoraPlan) -> None:
        ops.begin(plan)
        for t, original, group in zip(tensors, originals, groups, strict=True):
            t.y.copy_(original)
            add(ops, plan, pool, t, group)
            add(ops, plan, pool, t, group)

    captured = ops.plan([], [], launches)
    step(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    chooser = random.Random(3)
    for num_adapters in num_adapters_of_steps:
        adapter_index = random_batch(chooser, num_rows, num_adapters, launches)
        step(ops.plan(adapter_index, pool.adapters, launches))
        eager = [t.y.clone() for t in tensors]
        for t in tensors:
            t.y.fill_(torch.nan)
        ops.plan(adapter_index, pool.adapters, launches)
        for _ in range(3):  # the same plan again computes the same again
            graph.replay()
            for t, y, original in zip(tensors, eager, originals, strict=True):
                assert torch.equal(bits(t.y), bits(y)), adapter_index
                assert torch.equal(bits(t.y[len(adapter_index) :]), bits(original[len(adapter_index) :]))


def test_a_token_does_not_depend_on_how_the_rest_of_its_step_is_computed_beyond_rounding() -> None:
    """The same tokens by MBGMV and, among more of their adapter, by MBGMM."""
    dtype = torch.float16
    pool = Pool(LARGE, [40], dtype)
    ops = lora_ops(LARGE, dtype, torch.device("cuda"), MBGMM_FOR_FEW)
    tensors = Tensors.random(LARGE[0], 200, dtype)
    few = Tensors(tensors.x[:7], tensors.y[:7].clone(), tensors.y)
    for t, launches in ((tensors, LoraLaunches.MIXED), (few, LoraLaunches.DECODE)):
        plan = ops.plan([0] * len(t.y), pool.adapters, launches)
        ops.begin(plan)
        add(ops, plan, pool, t, LARGE[0])
    torch.testing.assert_close(tensors.y[:7], few.y, rtol=2e-3, atol=2e-3)


def test_steps_of_many_plans_in_a_row_do_not_disturb_each_other() -> None:
    """Plans are written while earlier steps still run: nothing may be overwritten before it is used."""
    dtype = torch.bfloat16
    pool = Pool(LARGE, [16, 64, 3, 9], dtype)
    ops = lora_ops(LARGE, dtype, torch.device("cuda"), LIMITS)
    chooser = random.Random(1)
    batches = [[chooser.randrange(-1, 4) for _ in range(chooser.choice([1, 7, 64, 120]))] for _ in range(20)]
    made = [Tensors.random(LARGE[0], len(batch), dtype) for batch in batches]
    expected = [reference(t.y, t.x, pool, batch, LARGE[0]) for t, batch in zip(made, batches, strict=True)]
    torch.cuda.synchronize()
    for t, batch in zip(made, batches, strict=True):
        plan = ops.plan(batch, pool.adapters)
        ops.begin(plan)
        add(ops, plan, pool, t, LARGE[0])
    for t, y in zip(made, expected, strict=True):
        assert ((t.y.double() - y).norm() / y.norm()).item() < TOLERANCES[dtype]


def test_products_are_cleared_before_the_marks_of_their_steps_come_round_again() -> None:
    """The count of steps has 20 bits in a mark, and it is that count, on the device, which decides."""
    pool = Pool(SMALL, [4], torch.bfloat16)
    ops = CudaLoraOps(SMALL, torch.bfloat16, torch.device("cuda"), LIMITS)
    parts, step = ops._buffers.parts.view(torch.int64), ops._buffers.step.view(torch.int32)
    plan = ops.plan([0], pool.adapters)
    for count, is_cleared in ((5, False), ((1 << 18) - 1, True), (1 << 18, False), ((1 << 20) - 1, True)):
        parts.fill_(7)
        step.fill_(count)
        ops.begin(plan)
        assert step[0].item() == count + 1
        assert torch.equal(parts, torch.full_like(parts, 0 if is_cleared else 7)), count


def test_the_plan_follows_adapters_that_moved() -> None:
    """The same batch is planned once, and again as soon as one of its adapters is another object, with other rows."""
    dtype = torch.bfloat16
    pool = Pool(SMALL, [4, 4], dtype)
    ops = lora_ops(SMALL, dtype, torch.device("cuda"), LIMITS)
    tensors = Tensors.random(SMALL[0], 3, dtype)
    original = tensors.y.clone()
    found = []
    for adapters in (pool.adapters[:1], pool.adapters[:1], pool.adapters[1:]):
        tensors.y.copy_(original)
        plan = ops.plan([0, 0, -1], adapters)
        ops.begin(plan)
        add(ops, plan, pool, tensors, SMALL[0])
        found.append(tensors.y.clone())
    assert torch.equal(bits(found[0]), bits(found[1]))
    assert not torch.equal(found[0][:2], found[2][:2])


def test_a_plan_is_empty_exactly_when_no_token_has_anything_to_add() -> None:
    pool = Pool(SMALL, [1], torch.bfloat16)
    ops = lora_ops(SMALL, torch.bfloat16, torch.device("cuda"), LIMITS)
    assert ops.plan([-1, -1], pool.adapters).is_empty
    assert ops.plan([], []).is_empty
    assert ops.plan([0], [LoraAdapter({})]).is_empty
    assert not ops.plan([-1, 0], pool.adapters).is_empty


def test_a_plan_tells_which_inputs_have_anything_added() -> None:
    pool = Pool(SMALL, [4], torch.bfloat16)
    only_o = LoraAdapter({"o_proj": pool.adapters[0].modules["o_proj"]})
    ops = lora_ops(SMALL, torch.bfloat16, torch.device("cuda"), LIMITS)
    for index in ([0], [0] * 100):
        plan = ops.plan(index, [only_o])
        assert [plan.changes(group) for group in SMALL] == [False, True]
    assert [ops.plan([-1], [only_o]).changes(group) for group in SMALL] == [False, False]


@pytest.mark.parametrize(
    ("adapter_index", "launches", "num_launches"),
    [
        ([0] * 4, LoraLaunches.AS_NEEDED, 1),
        ([0] * 5, LoraLaunches.AS_NEEDED, 1),
        ([0] * 5 + [1], LoraLaunches.AS_NEEDED, 2),
        ([0] * 4, LoraLaunches.MIXED, 2),
    ],
)
def test_a_step_that_need_not_be_as_others_launches_what_it_has_work_for(
    adapter_index: list[int], launches: LoraLaunches, num_launches: int
) -> None:
    pool = Pool(SMALL, [4, 4], torch.bfloat16)
    ops = CudaLoraOps(SMALL, torch.bfloat16, torch.device("cuda"), MBGMM_FOR_FEW)
    plan = ops.plan(adapter_index, pool.adapters, launches)
    ops.begin(plan)
    add(ops, plan, pool, Tensors.random(SMALL[0], len(adapter_index), torch.bfloat16), SMALL[0])
    assert plan.num_launches == num_launches


def test_what_the_kernels_cannot_take_is_caught_at_the_door() -> None:
    pool = Pool(SMALL, [4], torch.bfloat16)
    ops = lora_ops(SMALL, torch.bfloat16, torch.device("cuda"), LIMITS)
    tensors = Tensors.random(SMALL[0], 3, torch.bfloat16)
    plan = ops.plan([0, 0, 0], pool.adapters)
    with pytest.raises(AssertionError, match="begin"):
        add(ops, plan, pool, tensors, SMALL[0])
    ops.begin(plan)
    with pytest.raises(AssertionError, match=r"x is \(2, 264\), not \(3, 264\)"):
        ops.add(tensors.y, tensors.x[:2], pool.flat, plan, SMALL[0])
    with pytest.raises(AssertionError, match="16 bytes"):
        ops.add(tensors.y, tensors.x, pool.flat[1:], plan, SMALL[0])
    with pytest.raises(AssertionError, match="float32"):
        ops.add(tensors.y.float(), tensors.x, pool.flat, plan, SMALL[0])


def test_an_fp32_pool_is_served_by_torch() -> None:
    assert isinstance(lora_ops(SMALL, torch.float32, torch.device("cuda"), LIMITS), TorchLoraOps)
