"""What the host says of a step to the CUDA kernels: which tokens share an adapter, where tasks and products will lie.

Pure NumPy over a caller's buffer, so that it needs no GPU. Knows nothing of launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.adapter_entries import AdapterEntries
from kernels.lora import Indices, LoraAdapter, LoraLaunches, LoraTarget
from kernels.plan_layout import (
    ENTRY_INTS,
    HEADER_INTS,
    MATRIX_EXPAND_TOKENS,
    MATRIX_SHRINK_ROWS,
    MATRIX_SHRINK_TOKENS,
    MATRIX_SLICES,
    MATRIX_STEP,
    MATRIX_STEP_WORDS,
    PIECE_INTS,
    SPAN_INTS,
    TILE_ROWS,
    TILE_TOKENS,
    VECTOR_SLICES,
    Ints,
    Longs,
    LoraLimits,
    PlanCapacity,
    PlanShape,
    Slices,
    WantedTasks,
    ceil_div,
)


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What the launches need to know of a plan on the host. used_ints: how much of the buffer the device needs."""

    num_tokens: int
    used_ints: int
    has_vector: tuple[bool, ...]
    has_matrix: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Segments:
    """The step's tokens, grouped by adapter: where each group starts and how long it is. ranks: [segments, targets]."""

    starts: Longs
    counts: Longs
    ranks: Longs


class StepPlanner:
    """Fills plan buffers for one model. `groups` are the targets of q, k and v, of o, of gate and up, of down."""

    def __init__(self, groups: Sequence[Sequence[LoraTarget]], limits: LoraLimits, wanted_tasks: WantedTasks) -> None:
        self.shape = PlanShape(groups)
        self.limits = limits
        self.capacity = PlanCapacity.of(self.shape, limits, wanted_tasks)
        self._wanted_tasks = wanted_tasks
        self._entries = AdapterEntries(self.shape.targets, limits.max_requests, limits.max_rank)

    def write(self, buffer: Ints, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches) -> PlanSummary:
        """Writes the plan of a step into `buffer`, of capacity.plan_ints. DECODE: MBGMV alone, however much there is to do."""
        shape = self.shape
        index = np.asarray(adapter_index, dtype=np.int32)
        decode = launches is LoraLaunches.DECODE
        self._check(index, adapters, decode)
        order = np.argsort(index, kind="stable")
        num_base = int(np.count_nonzero(index < 0))
        ordered, token_rows = index[order[num_base:]], order[num_base:]
        starts = np.flatnonzero(_is_first_of_run(ordered))
        entries = self._entries.of([adapters[i] for i in ordered[starts].tolist()])
        segments = _Segments(starts, np.diff(starts, append=len(ordered)), entries["rank"].astype(np.int64))

        spans = np.zeros((shape.num_groups, 2, SPAN_INTS), dtype=np.int32)
        is_matrix = np.zeros(len(starts), dtype=bool) if decode else _is_for_matrix(segments, self.limits)
        tiles = self._tiles(segments, np.flatnonzero(~is_matrix), spans[:, 0])
        pieces = self._matrix_pieces(segments, np.flatnonzero(is_matrix), spans[:, 1])

        token_rows_end = shape.token_rows_at + len(token_rows)
        entries_at = token_rows_end + token_rows_end % 2  # entries hold 8-byte addresses
        tiles_at = entries_at + entries.size * ENTRY_INTS
        pieces_at = tiles_at + tiles.size
        used_ints = pieces_at + pieces.size
        buffer[:HEADER_INTS] = (len(tiles), tiles_at, len(pieces), pieces_at, entries_at, 0, 0, 0)
        buffer[HEADER_INTS : shape.token_rows_at] = spans.reshape(-1)
        buffer[shape.token_rows_at : token_rows_end] = token_rows
        buffer[entries_at:tiles_at] = entries.view(np.int32).reshape(-1)
        buffer[tiles_at:pieces_at] = tiles.reshape(-1)
        buffer[pieces_at:used_ints] = pieces.reshape(-1)
        has_vector, has_matrix = (spans[:, :, 1] > 0).T.tolist()
        return PlanSummary(len(index), used_ints, tuple(has_vector), tuple(has_matrix))

    def _check(self, index: Ints, adapters: Sequence[LoraAdapter], decode: bool) -> None:
        most = self.limits.max_requests if decode else self.limits.max_tokens
        assert index.ndim == 1 and len(index) <= most, f"{len(index)} tokens in a step (decode={decode}), at most {most}"
        if len(index):
            low, high = int(index.min()), int(index.max())
            assert low >= -1 and high < len(adapters), f"adapter_index has {low} to {high}, the step {len(adapters)} adapters"

    def _tiles(self, segments: _Segments, chosen: Longs, spans: Ints) -> Ints:
        """The chosen segments in pieces of up to 8 tokens, with where their tasks of MBGMV and their products begin."""
        if not len(chosen):
            return self._pieces(chosen, chosen, chosen)
        # The longest tasks first, so that none of them ends a launch alone.
        chosen = chosen[np.argsort(-segments.ranks.max(axis=1)[chosen], kind="stable")]
        num_tiles = ceil_div(segments.counts[chosen], TILE_TOKENS)
        of = np.repeat(chosen, num_tiles)
        within = (np.arange(len(of)) - np.repeat(_starts(num_tiles), num_tiles)) * TILE_TOKENS
        num_tokens = np.minimum(TILE_TOKENS, segments.counts[of] - within)
        ranks = segments.ranks[of]
        widths = np.add.reduceat(ranks, self.shape.first_target, axis=1)
        row_tiles = ceil_div(widths, TILE_ROWS)
        splits = self._split(spans, -(-self._wanted_tasks.vector // _totals(row_tiles)), VECTOR_SLICES)
        pieces = self._pieces(of, segments.starts[of] + within, num_tokens)
        self._fill_starts(
            pieces,
            spans,
            num_shrink=row_tiles * splits,
            num_expand=np.where(
                ranks > 0, np.where(num_tokens[:, None] == 1, self.shape.token_columns, self.shape.tile_columns), 0
            ),
            num_products=num_tokens[:, None] * widths * splits,
            num_rows=0,
        )
        return pieces

    def _matrix_pieces(self, segments: _Segments, chosen: Longs, spans: Ints) -> Ints:
        """The chosen segments whole, with where their tasks of MBGMM, their products and their list of rank rows begin."""
        if not len(chosen):
            return self._pieces(chosen, chosen, chosen)
        num_tokens = segments.counts[chosen]
        # Each module's rank rows fill whole operands of the tensor cores.
        ranks = ceil_div(segments.ranks[chosen], MATRIX_STEP) * MATRIX_STEP
        widths = np.add.reduceat(ranks, self.shape.first_target, axis=1)
        shrink_tiles = ceil_div(widths, MATRIX_SHRINK_ROWS) * ceil_div(num_tokens, MATRIX_SHRINK_TOKENS)[:, None]
        # No more tasks than thread blocks fit at once: a few in a second round would take as long as the first.
        splits = self._split(spans, self._wanted_tasks.matrix // _totals(shrink_tiles), MATRIX_SLICES)
        pieces = self._pieces(chosen, segments.starts[chosen], num_tokens)
        self._fill_starts(
            pieces,
            spans,
            num_shrink=shrink_tiles * splits,
            num_expand=(ranks > 0) * self.shape.matrix_columns * ceil_div(num_tokens, MATRIX_EXPAND_TOKENS)[:, None],
            num_products=ceil_div(num_tokens, MATRIX_STEP)[:, None] * (widths // MATRIX_STEP) * MATRIX_STEP_WORDS,
            num_rows=widths,
        )
        return pieces

    def _split(self, spans: Ints, wanted: Longs, slices: Slices) -> Longs:
        """Into how many slices each group's dot products are split: as many as wanted, as far as slices stay long."""
        in_features = self.shape.in_features
        most = np.minimum(slices.most, ceil_div(in_features, slices.shortest))
        splits = np.maximum(1, np.minimum(wanted, most))
        slice_length = ceil_div(ceil_div(in_features, splits), slices.step) * slices.step
        splits = ceil_div(in_features, slice_length)
        spans[:, 4], spans[:, 5] = splits, slice_length
        return splits

    def _pieces(self, segments: Longs, token_starts: Longs, num_tokens: Longs) -> Ints:
        pieces = np.zeros((len(segments), self.shape.piece_ints), dtype=np.int32)
        pieces[:, 0] = segments * len(self.shape.targets)
        pieces[:, 1] = token_starts
        pieces[:, 2] = num_tokens
        return pieces

    def _fill_starts(
        self, pieces: Ints, spans: Ints, *, num_shrink: Longs, num_expand: Longs, num_products: Longs, num_rows: Longs | int
    ) -> None:
        """num_expand: [pieces, targets]; the others [pieces, groups]. The tasks of a group follow one another."""
        shape, end = self.shape, 3 * self.shape.num_groups
        # In the order in which a piece holds what becomes of them, so that one running sum serves all.
        counts = np.empty((len(pieces), end + len(shape.targets)), dtype=np.int64)
        counts[:, 0:end:3], counts[:, 1:end:3], counts[:, 2:end:3] = num_shrink, num_products, num_rows
        counts[:, end:] = num_expand
        sums = counts.cumsum(axis=0)
        totals = sums[-1].copy()
        firsts = np.zeros_like(totals)
        for part in (slice(0, end, 3), slice(2, end, 3), slice(end, None)):
            firsts[part] = _starts(totals[part])
        # Launches follow one another on the device, so each group may use all the room that there is for products.
        sums -= counts
        sums += firsts
        pieces[:, PIECE_INTS:] = sums
        spans[:, 0], spans[:, 1] = firsts[0:end:3], totals[0:end:3]
        spans[:, 2] = firsts[end:][shape.first_target]
        spans[:, 3] = np.add.reduceat(totals[end:], shape.first_target)


def _is_for_matrix(segments: _Segments, limits: LoraLimits) -> NDArray[np.bool_]:
    """Which segments MBGMM computes: none, unless MBGMV would take longer for the step."""
    # A token of an adapter that changes nothing takes its room all the same.
    work = int(segments.counts @ np.maximum(1, segments.ranks.max(axis=1)))
    return segments.counts > (limits.vector_tokens if work > limits.vector_work else np.iinfo(np.int32).max)


def _totals(num_tiles: Longs) -> Longs:
    """Of each group, 1 where it has none, so that one can divide by it."""
    totals: Longs = num_tiles.sum(axis=0)
    return np.maximum(1, totals)


def _is_first_of_run(ordered: Ints) -> NDArray[np.bool_]:
    is_first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return is_first


def _starts(counts: Longs) -> Longs:
    """Running sum along the first axis, each element without itself."""
    return counts.cumsum(axis=0) - counts
