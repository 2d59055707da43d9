"""Sizes and layout of a step plan: how work is cut into tasks, and how much room the largest step needs.

Mirrors csrc/tasks.cuh; holds no step's data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.lora import LoraTarget

# MBGMM computes a segment only if the step's tokens, each times the largest rank of its adapter (1 at least), come to more than
# VECTOR_WORK and the segment has more than VECTOR_TOKENS tokens; MBGMV computes all else. That is a compromise: no one product of
# tokens and rank is right for all ranks. On an H200, MBGMM becomes the faster of the two, whoever the tokens belong to, at 1,200
# tokens of rank 8, 1,000 of rank 16, 400 of rank 64, 150 of rank 128: products of 10 to 26 thousand.
VECTOR_WORK = 1 << 14
VECTOR_TOKENS = 16

TILE_TOKENS = 8
TILE_ROWS = 16
TOKEN_COLUMNS = 1024
TILE_COLUMNS = 512
MATRIX_SHRINK_TOKENS = 64
MATRIX_SHRINK_ROWS = 64
MATRIX_EXPAND_TOKENS = 128
MATRIX_STEP = 16
MATRIX_STEP_WORDS = 256
MATRIX_EXPAND_COLUMNS = 128

SHRINK_TASK_BYTES = 128
EXPAND_TASK_BYTES = 80
MATRIX_SHRINK_TASK_BYTES = 32
MATRIX_EXPAND_TASK_BYTES = 48

HEADER_INTS = 8
SPAN_INTS = 8
PIECE_INTS = 4
ENTRY = np.dtype([("a_rows", "i8"), ("b_rows", "i8"), ("rank", "i4"), ("scaling", "f4")])
ENTRY_INTS = ENTRY.itemsize // 4

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


def ceil_div(a: Longs, b: int | Longs) -> Longs:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Slices:
    """How a dot product may be split into slices of features: the most slices, the shortest, and what divides their length."""

    most: int
    shortest: int
    step: int


VECTOR_SLICES = Slices(most=8, shortest=256, step=32)
MATRIX_SLICES = Slices(most=8, shortest=512, step=128)


@dataclass(frozen=True, slots=True)
class WantedTasks:
    """How many shrink tasks keep a device busy: of MBGMV (a warp each) and of MBGMM (a thread block each)."""

    vector: int
    matrix: int


@dataclass(frozen=True, slots=True)
class LoraLimits:
    """The largest step: its tokens, its requests (so also its adapters), and the largest rank of a module.

    vector_work: steps whose tokens times ranks come to no more are computed by MBGMV alone. vector_tokens: of all other steps it
    keeps the segments of no more tokens.
    """

    max_tokens: int
    max_requests: int
    max_rank: int
    vector_work: int = VECTOR_WORK
    vector_tokens: int = VECTOR_TOKENS

    @property
    def max_vector_tokens(self) -> int:
        """Most tokens that one step can send to MBGMV."""
        return max(self.max_requests, min(self.max_tokens, max(self.vector_work, self.vector_tokens * self.max_requests)))

    @property
    def max_vector_work(self) -> int:
        """Most of its tokens times their ranks."""
        most_tokens = max(self.max_requests, min(self.max_tokens, self.vector_tokens * self.max_requests))
        return max(self.vector_work, most_tokens * self.max_rank)


class PlanShape:
    """A model's inputs and modules as arrays: `groups` are the targets of q, k and v, of o, of gate and up, of down."""

    def __init__(self, groups: Sequence[Sequence[LoraTarget]]) -> None:
        self.targets = tuple(target for group in groups for target in group)
        self.num_groups = len(groups)
        self.first_target = np.cumsum([0, *(len(group) for group in groups)])[:-1]
        self.num_targets_of = np.array([len(group) for group in groups])
        self.in_features = np.array([group[0].in_features for group in groups], dtype=np.int64)
        self.out_features = np.array([target.out_features for target in self.targets], dtype=np.int64)
        self.token_columns = ceil_div(self.out_features, TOKEN_COLUMNS)
        self.tile_columns = ceil_div(self.out_features, TILE_COLUMNS)
        self.matrix_columns = ceil_div(self.out_features, MATRIX_EXPAND_COLUMNS)
        self.piece_ints = PIECE_INTS + 3 * self.num_groups + len(self.targets)
        self.token_rows_at = HEADER_INTS + 2 * self.num_groups * SPAN_INTS

    def device_table(self) -> Ints:
        """GroupShape of every group, then TargetShape of every target."""
        groups = zip(self.first_target, self.num_targets_of, self.in_features, strict=True)
        rows = [[first, number, features, 0] for first, number, features in groups]
        rows += [[target.out_start, target.out_features, 0, 0] for target in self.targets]
        return np.array(rows, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """Sizes that no step within the limits can exceed."""

    plan_ints: int
    shrink_tasks: int
    expand_tasks: int
    parts: int
    rank_rows: int
    matrix_shrink_tasks: int
    matrix_expand_tasks: int
    products: int
    partials: int
    counters: int

    @staticmethod
    def of(shape: PlanShape, limits: LoraLimits, wanted_tasks: WantedTasks) -> "PlanCapacity":
        """The room for the largest step of a model."""
        tokens, segments = limits.max_vector_tokens, limits.max_requests
        tiles = min(tokens, segments + tokens // TILE_TOKENS)
        matrix_segments = min(segments, limits.max_tokens // (limits.vector_tokens + 1))
        widths = shape.num_targets_of * limits.max_rank
        padded_widths = shape.num_targets_of * int(ceil_div(np.array(limits.max_rank), MATRIX_STEP)) * MATRIX_STEP
        row_tiles = tiles * ceil_div(widths, TILE_ROWS)
        matrix_tiles = matrix_segments + limits.max_tokens // MATRIX_SHRINK_TOKENS
        matrix_expand_tiles = matrix_segments + limits.max_tokens // MATRIX_EXPAND_TOKENS
        # MBGMV splits each of n tasks into wanted / n, rounded up: fewer than are wanted come to them, each with its products.
        more_tasks = wanted_tasks.vector - 1
        parts = shape.num_targets_of.max() * limits.max_vector_work + more_tasks * TILE_ROWS * TILE_TOKENS
        # MBGMM rounds down: where it splits at all, there are no more tasks than wanted.
        matrix_shrink_tasks = matrix_tiles * ceil_div(padded_widths, MATRIX_SHRINK_ROWS)
        step_tiles = matrix_segments + limits.max_tokens // MATRIX_STEP
        return PlanCapacity(
            plan_ints=shape.token_rows_at
            + limits.max_tokens
            + 4
            + (tiles + matrix_segments) * shape.piece_ints
            + segments * len(shape.targets) * ENTRY_INTS,
            shrink_tasks=int(row_tiles.sum()) + more_tasks * shape.num_groups,
            # A tile of several tokens has no more than two tasks where each of its tokens alone has one.
            expand_tasks=int(min(tokens * shape.token_columns.sum(), tiles * shape.tile_columns.sum())),
            parts=int(parts),
            rank_rows=int(matrix_segments * padded_widths.sum()),
            matrix_shrink_tasks=int(np.maximum(matrix_shrink_tasks, wanted_tasks.matrix).sum()),
            matrix_expand_tasks=int(matrix_expand_tiles * shape.matrix_columns.sum()),
            products=int(step_tiles * padded_widths.max() // MATRIX_STEP * MATRIX_STEP_WORDS),
            # One of each task of a group whose products are split.
            partials=wanted_tasks.matrix * MATRIX_SHRINK_ROWS * MATRIX_SHRINK_TOKENS,
            counters=wanted_tasks.matrix,
        )
