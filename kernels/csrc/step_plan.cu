// Makes the task lists of a step of what the host uploaded, so that the host describes a step in a few kilobytes.
// Captured at the head of a CUDA graph it makes every replay follow the plan that was uploaded last.

#include "tasks.cuh"

namespace {

constexpr unsigned kStepsBeforeClearing = 1u << 18;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What one warp needs to know of a tile or a segment and one input.
struct Work {
  Piece piece;
  const int* starts;          // {shrink_start, v_start, row_start} of this group
  const int* expand_starts;   // of all targets
  const AdapterEntry* entries;  // of this group's targets
  GroupShape group;
  TaskSpan span;
  const int* token_rows;
  int width;  // rank rows of all modules of the group; of a segment, each module's in a multiple of 16
};

__device__ __forceinline__ int round_up(int a, int step) { return ceil_div(a, step) * step; }

// Offset of row `row` of the modules' rank rows, side by side, each module's in a multiple of `step`; -1: none there.
__device__ int rank_row(const Work& work, int row, int step) {
  for (int m = 0; m < work.group.num_targets; ++m) {
    const AdapterEntry& entry = work.entries[m];
    if (row < entry.rank) return static_cast<int>(entry.a_rows[row] / kVectorLength);
    row -= round_up(entry.rank, step);
    if (row < 0) return -1;
  }
  return -1;
}

__device__ void write_tile(const Work& work, const TargetShape* targets, ShrinkTask* shrink_tasks, ExpandTask* expand_tasks,
                           int lane) {
  const Piece& piece = work.piece;
  const int split_stride = piece.num_tokens * work.width;
  const int num_row_tiles = ceil_div(work.width, kTileRows);
  for (int tile = 0; tile < num_row_tiles; ++tile) {
    const int row = lane < kTileRows ? rank_row(work, tile * kTileRows + lane, 1) : -1;
    const int token = lane < kTileTokens && lane < piece.num_tokens ? work.token_rows[piece.token_start + lane] : -1;
    for (int split = 0; split < work.span.num_splits; ++split) {
      ShrinkTask& task = shrink_tasks[work.starts[0] + tile * work.span.num_splits + split];
      if (lane < kTileRows) task.rows[lane] = row;
      if (lane < kTileTokens) task.tokens[lane] = token;
      if (lane == 0) {
        task.begin = split * work.span.slice_length;
        task.end = min(work.group.in_features, task.begin + work.span.slice_length);
        task.v_start = work.starts[1] + split * split_stride + tile * kTileRows;
        task.v_stride = work.width;
      }
    }
  }
  int v_start = work.starts[1];
  for (int m = 0; m < work.group.num_targets; ++m) {
    const AdapterEntry entry = work.entries[m];
    if (entry.rank == 0) continue;
    const TargetShape target = targets[work.group.first_target + m];
    const int num_columns = piece.num_tokens == 1 ? kTokenColumns : kTileColumns;
    ExpandTask* tasks = expand_tasks + work.expand_starts[work.group.first_target + m];
    for (int i = lane; i < ceil_div(target.out_features, num_columns); i += 32) {
      const int offset = i * num_columns;
      ExpandTask task;
      task.b_rows = entry.b_rows;
      task.row_offset = offset;
      task.rank = entry.rank;
      task.num_tokens = piece.num_tokens;
      for (int t = 0; t < kTileTokens; ++t) task.tokens[t] = work.token_rows[piece.token_start + (t < piece.num_tokens ? t : 0)];
      task.v_start = v_start;
      task.v_stride = work.width;
      task.split_stride = split_stride;
      task.num_splits = work.span.num_splits;
      task.column = target.out_start + offset;
      task.num_columns = min(num_columns, target.out_features - offset);
      task.scaling = entry.scaling;
      tasks[i] = task;
    }
    v_start += entry.rank;
  }
}

__device__ void write_segment(const Work& work, const TargetShape* targets, int* rank_rows, MatrixShrinkTask* shrink_tasks,
                              MatrixExpandTask* expand_tasks, int lane) {
  const Piece& piece = work.piece;
  for (int row = lane; row < work.width; row += 32) rank_rows[work.starts[2] + row] = rank_row(work, row, kMatrixStep);
  const int v_stride = work.width / kMatrixStep * kMatrixStepWords;
  const int num_splits = work.span.num_splits, num_row_tiles = ceil_div(work.width, kMatrixShrinkRows);
  const int num_shrink = num_splits * num_row_tiles * ceil_div(piece.num_tokens, kMatrixShrinkTokens);
  for (int i = lane; i < num_shrink; i += 32) {
    const int begin = i % num_splits * work.span.slice_length;
    const int row = i / num_splits % num_row_tiles * kMatrixShrinkRows;
    const int first = i / num_splits / num_row_tiles * kMatrixShrinkTokens;
    shrink_tasks[work.starts[0] + i] = {work.starts[2] + row,
                                        min(kMatrixShrinkRows, work.width - row),
                                        piece.token_start + first,
                                        min(kMatrixShrinkTokens, piece.num_tokens - first),
                                        work.starts[1] + first / kMatrixStep * v_stride + row / kMatrixStep * kMatrixStepWords,
                                        v_stride,
                                        begin,
                                        min(work.group.in_features, begin + work.span.slice_length)};
  }
  int v_start = work.starts[1];
  for (int m = 0; m < work.group.num_targets; ++m) {
    const AdapterEntry entry = work.entries[m];
    if (entry.rank == 0) continue;
    const TargetShape target = targets[work.group.first_target + m];
    const int num_columns = ceil_div(target.out_features, kMatrixExpandColumns);
    const int num_tasks = num_columns * ceil_div(piece.num_tokens, kMatrixExpandTokens);
    MatrixExpandTask* tasks = expand_tasks + work.expand_starts[work.group.first_target + m];
    for (int i = lane; i < num_tasks; i += 32) {
      const int first = i / num_columns * kMatrixExpandTokens, offset = i % num_columns * kMatrixExpandColumns;
      tasks[i] = {entry.b_rows,
                  offset,
                  entry.rank,
                  piece.token_start + first,
                  min(kMatrixExpandTokens, piece.num_tokens - first),
                  v_start + first / kMatrixStep * v_stride,
                  v_stride,
                  target.out_start + offset,
                  min(kMatrixExpandColumns, target.out_features - offset),
                  entry.scaling,
                  0};
    }
    v_start += ceil_div(entry.rank, kMatrixStep) * kMatrixStepWords;
  }
}

}  // namespace

// plan: as uploaded. groups: [num_groups], targets: [num_targets], the model's. step: counts the runs of this kernel, replays too;
// with it MBGMV marks its products in `parts`, to tell them from those of earlier steps. A mark has room for 20 bits of the count:
// long before they come round again, all parts are cleared.
extern "C" __global__ void write_tasks(const int* __restrict__ plan, const GroupShape* __restrict__ groups,
                                       const TargetShape* __restrict__ targets, int num_groups, int num_targets, unsigned* step,
                                       ShrinkTask* __restrict__ shrink_tasks, ExpandTask* __restrict__ expand_tasks,
                                       int* __restrict__ rank_rows, MatrixShrinkTask* __restrict__ matrix_shrink_tasks,
                                       MatrixExpandTask* __restrict__ matrix_expand_tasks,
                                       unsigned long long* __restrict__ parts, int num_parts) {
  if (blockIdx.x == gridDim.x - 1) {  // which has the fewest tasks to write
    const unsigned count = *step + 1;
    __syncthreads();
    if (threadIdx.x == 0) *step = count;
    if (count % kStepsBeforeClearing == 0)
      for (int i = threadIdx.x; i < num_parts; i += blockDim.x) parts[i] = 0;
  }
  const PlanHeader header = *reinterpret_cast<const PlanHeader*>(plan);
  const TaskSpan* spans = reinterpret_cast<const TaskSpan*>(plan + sizeof(PlanHeader) / 4);
  const int lane = threadIdx.x & 31;
  const int num_warps = gridDim.x * (blockDim.x >> 5);
  const int piece_ints = 4 + 3 * num_groups + num_targets;
  const int num_pieces = header.num_tiles + header.num_segments;
  for (int i = (blockIdx.x * blockDim.x + threadIdx.x) >> 5; i < num_pieces * num_groups; i += num_warps) {
    const int group = i % num_groups, number = i / num_groups;
    const bool is_tile = number < header.num_tiles;
    const int* piece = plan + (is_tile ? header.tiles_at + number * piece_ints
                                       : header.segments_at + (number - header.num_tiles) * piece_ints);
    Work work;
    work.piece = {piece[0], piece[1], piece[2], 0};
    work.starts = piece + 4 + 3 * group;
    work.expand_starts = piece + 4 + 3 * num_groups;
    work.group = groups[group];
    work.entries = reinterpret_cast<const AdapterEntry*>(plan + header.entries_at) + work.piece.entry + work.group.first_target;
    work.span = spans[2 * group + (is_tile ? 0 : 1)];
    work.token_rows = plan + sizeof(PlanHeader) / 4 + num_groups * 2 * sizeof(TaskSpan) / 4;
    work.width = 0;
    for (int m = 0; m < work.group.num_targets; ++m) work.width += round_up(work.entries[m].rank, is_tile ? 1 : kMatrixStep);
    if (work.width == 0) continue;
    if (is_tile)
      write_tile(work, targets, shrink_tasks, expand_tasks, lane);
    else
      write_segment(work, targets, rank_rows, matrix_shrink_tasks, matrix_expand_tasks, lane);
  }
}
