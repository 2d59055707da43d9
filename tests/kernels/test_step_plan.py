"""The step plan as the host writes it: every token once, nothing overlaps, and the largest step fits."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lora import LoraAdapter, LoraLaunches, LoraRows, LoraTarget
from kernels.plan_layout import (
    ENTRY,
    ENTRY_INTS,
    HEADER_INTS,
    MATRIX_STEP,
    MATRIX_STEP_WORDS,
    PIECE_INTS,
    SPAN_INTS,
    Ints,
    LoraLimits,
    WantedTasks,
)
from kernels.step_plan import PlanSummary, StepPlanner

Groups = tuple[tuple[LoraTarget, ...], ...]


def groups_of(qkv_features: int, o_features: int) -> Groups:
    qkv = (("q_proj", 512, 0), ("k_proj", 128, 512), ("v_proj", 128, 640))
    return (
        tuple(LoraTarget(module, qkv_features, width, start) for module, width, start in qkv),
        (LoraTarget("o_proj", o_features, 264, 0),),
    )


GROUPS = groups_of(512, 520)
MODULES = [target.module for group in GROUPS for target in group]
LIMITS = LoraLimits(max_tokens=1000, max_requests=24, max_rank=40)
MBGMM_FOR_FEW = replace(LIMITS, vector_work=0, vector_tokens=2)
WANTED = WantedTasks(vector=40, matrix=10)


def adapter(ranks: list[int]) -> LoraAdapter:
    modules = {}
    for module, rank in zip(MODULES, ranks, strict=True):
        if rank:
            rows = torch.zeros(rank, dtype=torch.int64)
            modules[module] = LoraRows(rank, rank / 8, rows, rows.clone())
    return LoraAdapter(modules)


@dataclass(frozen=True)
class Written:
    """A plan, read back."""

    planner: StepPlanner
    summary: PlanSummary
    buffer: Ints
    wanted: WantedTasks
    groups: Groups

    @property
    def tiles(self) -> Ints:
        return self._pieces(0)

    @property
    def segments(self) -> Ints:
        return self._pieces(2)

    def _pieces(self, at: int) -> Ints:
        number, start = self.buffer[at : at + 2]
        width = self.planner.shape.piece_ints
        return self.buffer[start : start + number * width].reshape(number, width)

    def spans(self, kind: int) -> Ints:
        spans = self.buffer[HEADER_INTS : self.planner.shape.token_rows_at].reshape(-1, 2, SPAN_INTS)
        return spans[:, kind]

    def ranks(self, piece: Ints) -> list[int]:
        start = int(self.buffer[4]) + int(piece[0]) * ENTRY_INTS
        entries = self.buffer[start : start + len(MODULES) * ENTRY_INTS].view(ENTRY)
        return [int(rank) for rank in entries["rank"]]

    def tokens(self, piece: Ints) -> list[int]:
        start = self.planner.shape.token_rows_at + int(piece[1])
        return [int(row) for row in self.buffer[start : start + int(piece[2])]]


def write(
    adapter_index: list[int],
    ranks: list[list[int]],
    launches: LoraLaunches = LoraLaunches.AS_NEEDED,
    limits: LoraLimits = LIMITS,
    wanted: WantedTasks = WANTED,
    groups: Groups = GROUPS,
) -> Written:
    planner = StepPlanner(groups, limits, wanted)
    buffer = np.full(planner.capacity.plan_ints, -(10**9), dtype=np.int32)
    summary = planner.write(buffer, adapter_index, [adapter(r) for r in ranks], launches)
    assert summary.used_ints <= planner.capacity.plan_ints
    return Written(planner, summary, buffer, wanted, groups)


ranks_of_adapters = st.lists(st.lists(st.integers(0, LIMITS.max_rank), min_size=4, max_size=4), min_size=1, max_size=6)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[list[int]], LoraLaunches]:
    ranks = draw(ranks_of_adapters)
    launches = draw(st.sampled_from(LoraLaunches))
    runs = draw(st.lists(st.tuples(st.integers(-1, len(ranks) - 1), st.integers(1, 40) | st.integers(1, 300)), max_size=6))
    index = [number for number, length in runs for _ in range(length)]
    most = LIMITS.max_requests if launches is LoraLaunches.DECODE else LIMITS.max_tokens
    return draw(st.permutations(index))[:most] if len(index) < 60 else index[:most], ranks, launches


@settings(max_examples=80, deadline=None)
@given(steps(), st.sampled_from((LIMITS, MBGMM_FOR_FEW)))
def test_every_token_with_an_adapter_is_in_exactly_one_piece(
    step: tuple[list[int], list[list[int]], LoraLaunches], limits: LoraLimits
) -> None:
    adapter_index, ranks, launches = step
    plan = write(adapter_index, ranks, launches, limits)
    seen: list[int] = []
    for pieces, most in ((plan.tiles, 8), (plan.segments, LIMITS.max_tokens)):
        for piece in pieces:
            tokens = plan.tokens(piece)
            owners = {adapter_index[token] for token in tokens}
            assert len(owners) == 1 and 1 <= len(tokens) <= most
            assert plan.ranks(piece) == ranks[owners.pop()]
            seen += tokens
    assert sorted(seen) == [token for token, index in enumerate(adapter_index) if index >= 0]
    for piece in plan.segments:
        assert launches is not LoraLaunches.DECODE and piece[2] > limits.vector_tokens


def check_disjoint(regions: list[tuple[int, int]], room: int) -> None:
    """Regions (start, length) lie side by side from 0, without a gap, within the room."""
    end = 0
    for start, length in sorted(region for region in regions if region[1]):
        assert start == end
        end += length
    assert end <= room


@st.composite
def plans(draw: st.DrawFn) -> Written:
    """Of any model on any device, within limits that are often met."""
    max_requests, max_rank = draw(st.integers(1, 6)), draw(st.integers(1, 80))
    limits = LoraLimits(
        max_tokens=max_requests + draw(st.integers(0, 200)),
        max_requests=max_requests,
        max_rank=max_rank,
        vector_work=draw(st.sampled_from((0, 200, 1 << 14))),
        vector_tokens=draw(st.integers(1, 16)),
    )
    rank = st.just(max_rank) | st.integers(0, max_rank)
    ranks = draw(st.lists(st.lists(rank, min_size=4, max_size=4), min_size=1, max_size=max_requests))
    lengths = [draw(st.integers(1, 40) | st.just(limits.max_tokens)) for _ in ranks]
    launches = draw(st.sampled_from(LoraLaunches))
    most = limits.max_requests if launches is LoraLaunches.DECODE else limits.max_tokens
    index = [number for number, length in enumerate(lengths) for _ in range(length)][:most]
    wanted = WantedTasks(vector=draw(st.integers(1, 100)), matrix=draw(st.integers(1, 40)))
    features = st.sampled_from((8, 520, 2048, 4096, 11008))
    return write(index, ranks, launches, limits, wanted, groups_of(draw(features), draw(features)))


@settings(max_examples=200, deadline=None)
@given(plans())
def test_tasks_and_products_fill_their_rooms_side_by_side(plan: Written) -> None:
    check_rooms(plan)


def test_room_for_split_products_of_mbgmv_is_used_to_the_last() -> None:
    """Three tasks of 16 rank rows and 8 tokens for q, k and v, where seven are wanted: each becomes three."""
    limits = LoraLimits(max_tokens=8, max_requests=1, max_rank=16, vector_work=0, vector_tokens=8)
    plan = write([0] * 8, [[16] * 4], limits=limits, wanted=WantedTasks(vector=7, matrix=1), groups=groups_of(2048, 2048))
    check_rooms(plan)
    assert plan.spans(0)[0, 1] == 9
    assert plan.planner.capacity.parts == 9 * 16 * 8


def test_room_for_split_products_of_mbgmm_is_used_to_the_last() -> None:
    """A tile of 64 tokens and 64 rank rows in each group, whose slices may be short enough to make all wanted tasks of it."""
    limits = LoraLimits(max_tokens=64, max_requests=1, max_rank=16, vector_work=0)
    plan = write([0] * 64, [[16] * 4], limits=limits, wanted=WantedTasks(vector=8, matrix=8), groups=groups_of(4096, 4096))
    check_rooms(plan)
    num_shrink, num_splits = plan.spans(1)[:, 1], plan.spans(1)[:, 4]
    assert num_shrink.tolist() == num_splits.tolist() == [8, 8]
    assert num_shrink.sum() == plan.planner.capacity.matrix_shrink_tasks
    assert num_shrink.max() * 64 * 64 == plan.planner.capacity.partials


def check_rooms(plan: Written) -> None:
    capacity = plan.planner.capacity
    shape = plan.planner.shape
    for kind, pieces in ((0, plan.tiles), (1, plan.segments)):
        shrink: list[tuple[int, int]] = []
        expand: list[tuple[int, int]] = []
        rank_rows: list[tuple[int, int]] = []
        for g, group in enumerate(plan.groups):
            span = plan.spans(kind)[g]
            num_splits, slice_length = int(span[4]), int(span[5])
            products: list[tuple[int, int]] = []
            first = int(shape.first_target[g])
            of_group: list[tuple[int, int]] = []
            for piece in pieces:
                assert (num_splits - 1) * slice_length < group[0].in_features <= num_splits * slice_length
                ranks = plan.ranks(piece)[first : first + len(group)]
                shrink_start, v_start, row_start = piece[PIECE_INTS + 3 * g : PIECE_INTS + 3 * g + 3].tolist()
                tokens = int(piece[2])
                if kind == 0:
                    width = sum(ranks)
                    of_group.append((shrink_start, -(-width // 16) * num_splits))
                    products.append((v_start, tokens * width * num_splits))
                else:
                    width = sum(-(-rank // MATRIX_STEP) * MATRIX_STEP for rank in ranks)
                    of_group.append((shrink_start, -(-width // 64) * -(-tokens // 64) * num_splits))
                    rank_rows.append((row_start, width))
                    products.append((v_start, -(-tokens // MATRIX_STEP) * (width // MATRIX_STEP) * MATRIX_STEP_WORDS))
                for m, (target, rank) in enumerate(zip(group, ranks, strict=True)):
                    columns = 128 if kind == 1 else 1024 if tokens == 1 else 512
                    num_expand = -(-target.out_features // columns) * -(-tokens // 128) if rank else 0
                    expand.append((int(piece[PIECE_INTS + 3 * shape.num_groups + first + m]), num_expand))
            check_disjoint(products, capacity.parts if kind == 0 else capacity.products)
            assert sum(length for _, length in of_group) == span[1]
            assert kind == 0 or num_splits <= 1 or int(span[1]) <= plan.wanted.matrix, "more than run at once"
            assert kind == 0 or num_splits <= 1 or int(span[1]) * 64 * 64 <= capacity.partials
            assert kind == 0 or num_splits <= 1 or int(span[1]) // num_splits <= capacity.counters
            shrink += of_group
        check_disjoint(shrink, capacity.shrink_tasks if kind == 0 else capacity.matrix_shrink_tasks)
        check_disjoint(rank_rows, capacity.rank_rows)
        check_disjoint(expand, capacity.expand_tasks if kind == 0 else capacity.matrix_expand_tasks)


@pytest.mark.parametrize("limits", [LIMITS, MBGMM_FOR_FEW], ids=["as served", "MBGMM for few"])
@pytest.mark.parametrize(
    ("adapter_index", "launches"),
    [
        (list(range(24)), LoraLaunches.DECODE),
        ([t // 2 for t in range(48)], LoraLaunches.MIXED),
        ([t // 3 for t in range(72)], LoraLaunches.MIXED),
        ([t % 24 for t in range(1000)], LoraLaunches.AS_NEEDED),
        ([t % 24 for t in range(409)], LoraLaunches.AS_NEEDED),
        ([t // 16 for t in range(384)] + [12] * 616, LoraLaunches.MIXED),
        ([t // 17 for t in range(408)], LoraLaunches.MIXED),
        ([t // 60 for t in range(420)], LoraLaunches.MIXED),
        ([0] * 1000, LoraLaunches.MIXED),
    ],
)
def test_the_largest_step_fits(adapter_index: list[int], launches: LoraLaunches, limits: LoraLimits) -> None:
    ranks = [[LIMITS.max_rank] * 4 for _ in range(24)]
    check_rooms(write(adapter_index, ranks, launches, limits))


@pytest.mark.parametrize(
    ("counts_and_ranks", "for_matrix"),
    [
        ([(1000, 16)], []),
        ([(409, 40), (24, 1)], []),
        ([(409, 40), (25, 1)], [0, 1]),
        ([(400, 40), (17, 32), (16, 40), (1, 8)], [0, 1]),
    ],
)
def test_long_segments_of_steps_with_much_work_go_to_mbgmm(
    counts_and_ranks: list[tuple[int, int]], for_matrix: list[int]
) -> None:
    index = [i for i, (count, _) in enumerate(counts_and_ranks) for _ in range(count)]
    plan = write(index, [[1, rank, 0, 1] for _, rank in counts_and_ranks])
    assert [int(piece[0]) // len(MODULES) for piece in plan.segments] == for_matrix
    assert bool(for_matrix) == (sum(count * rank for count, rank in counts_and_ranks) > LIMITS.vector_work)


def test_steps_past_the_limits_are_caught() -> None:
    with pytest.raises(AssertionError, match="1001 tokens"):
        write([0] * 1001, [[1] * 4])
    with pytest.raises(AssertionError, match="25 tokens"):
        write([0] * 25, [[1] * 4], LoraLaunches.DECODE)
    with pytest.raises(AssertionError, match="rank 41"):
        write([0], [[41, 0, 0, 0]])
    with pytest.raises(AssertionError, match="has -1 to 2, the step 2 adapters"):
        write([-1, 2], [[1] * 4, [1] * 4])


def test_tokens_of_an_adapter_that_changes_nothing_have_room_too() -> None:
    planner = StepPlanner(GROUPS, LoraLimits(max_tokens=40_000, max_requests=24, max_rank=40), WANTED)
    buffer = np.zeros(planner.capacity.plan_ints, dtype=np.int32)
    summary = planner.write(buffer, [0] * 40_000, [adapter([0] * 4)], LoraLaunches.AS_NEEDED)
    assert summary.used_ints <= len(buffer) and not any((*summary.has_vector, *summary.has_matrix))


def test_more_adapters_than_are_remembered_are_read_again() -> None:
    planner = StepPlanner(GROUPS, LIMITS, WANTED)
    buffer = np.zeros(planner.capacity.plan_ints, dtype=np.int32)
    for round in range(30):
        adapters = [adapter([1 + (round + i) % 40, 0, 3, 0]) for i in range(10)]
        summary = planner.write(buffer, list(range(10)), adapters, LoraLaunches.DECODE)
        plan = Written(planner, summary, buffer, WANTED, GROUPS)
        found = {plan.tokens(piece)[0]: plan.ranks(piece)[0] for piece in plan.tiles}
        assert found == {i: 1 + (round + i) % 40 for i in range(10)}
        largest = [max(rank, 3) for rank in found.values()]
        assert largest == sorted(largest, reverse=True), "the longest tasks come first"
