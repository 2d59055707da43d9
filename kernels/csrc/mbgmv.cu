// MBGMV: the adapter part of linear modules for few tokens per adapter (decode), in one launch.
// S-LoRA §5 calls it Multi-size Batched Gather Matrix-Vector multiplication.
//
// One warp does one task at a time. A shrink task multiplies up to 16 rank rows of A with one slice of x for up to 8 tokens, on
// tensor cores; an expand task adds to up to 256 columns of y for up to 4 tokens. Tasks are dealt out in order, shrink before
// expand, so that memory stays busy across what would otherwise be a kernel boundary.
//
// Products travel from shrink to expand in 8 bytes: the number, and a mark that no other launch ever writes there. Whoever sees
// the mark has the number, so there is no counter, no fence, and nothing to clear. An expand task loads its part of B first and
// waits then. As a warp finishes its shrink tasks before it may wait, and all thread blocks of the grid become resident, nothing
// waits for ever; two launches that share v must therefore never run side by side.

#include "element.cuh"
#include "matrix.cuh"
#include "tasks.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 3;
constexpr int kSteps = 8;  // of 32 features, in flight at once

using Part = unsigned long long;  // fp32 bits of a product of one slice, and above them the mark of the launch

__device__ __forceinline__ void store_part(Part* to, float value, unsigned mark) {
  const Part part = static_cast<Part>(mark) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(part) : "memory");
}

__device__ __forceinline__ Part load_part(const Part* from) {
  Part part;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(part) : "l"(from) : "memory");
  return part;
}

// A shrink task as one lane sees it: two of its rank rows, one of its tokens.
struct ShrinkLane {
  int row_low, row_high, token;
  int4 slice;  // begin, end, v_start, v_stride

  __device__ __forceinline__ void load(const ShrinkTask* tasks, int i, bool is_inside, int lane) {
    if (!is_inside) return;
    const ShrinkTask* task = tasks + i;
    row_low = task->rows[lane >> 2];
    row_high = task->rows[(lane >> 2) + 8];
    token = task->tokens[lane >> 2];
    slice = *reinterpret_cast<const int4*>(&task->begin);
  }
};

// v = A x. The order of features within a product is free: each lane loads 16 bytes, 8 neighbouring features, of its rows and of
// its token, and uses them as the operands of two steps.
__device__ __forceinline__ void shrink(const ShrinkLane& task, const Element* pool, const Element* x, long long x_stride, Part* v,
                                       unsigned mark, bool& has_waited, int lane) {
  const int column = (lane & 3) * kVectorLength;
  const Element* low_row = pool + static_cast<long long>(task.row_low) * kVectorLength;
  const Element* high_row = pool + static_cast<long long>(task.row_high) * kVectorLength;
  const Element* x_row = x + task.token * x_stride;
  float sums[2][4] = {};
  for (int base = task.slice.x + column; base - column < task.slice.y; base += 32 * kSteps) {
    uint4 low[kSteps], high[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = base + 32 * s;
      low[s] = load_weights(low_row + k, task.row_low >= 0 && k < task.slice.y);
      high[s] = load_weights(high_row + k, task.row_high >= 0 && k < task.slice.y);
    }
    if (!has_waited) {
      wait_for_previous_launch();
      has_waited = true;
    }
#pragma unroll
    for (int half = 0; half < kSteps; half += kSteps / 2) {
      uint4 features[kSteps / 2];
#pragma unroll
      for (int s = 0; s < kSteps / 2; ++s) {
        const int k = base + 32 * (half + s);
        features[s] = load_activations(x_row + k, task.token >= 0 && k < task.slice.y);
      }
#pragma unroll
      for (int s = 0; s < kSteps / 2; ++s) {
        const uint4 &a = low[half + s], &b = high[half + s], &c = features[s];
        multiply_add(sums[0], a.x, b.x, a.y, b.y, c.x, c.y);
        multiply_add(sums[1], a.z, b.z, a.w, b.w, c.z, c.w);
      }
    }
  }
  // This lane's sums are of rows lane / 4 and 8 more, and of two tokens; lane / 4 is also the token that it loaded.
  const int first = (lane & 3) * 2;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const bool has_token = __shfl_sync(~0u, task.token, (first + t) * 4) >= 0;
    Part* to = v + task.slice.z + (first + t) * task.slice.w + (lane >> 2);
    if (has_token && task.row_low >= 0) store_part(to, sums[0][t] + sums[1][t], mark);
    if (has_token && task.row_high >= 0) store_part(to + 8, sums[0][t + 2] + sums[1][t + 2], mark);
  }
}

// Lane i gets v of rank row `base + i % kRanks` for each token, summed over the slices, as soon as they are there.
template <int kTokens, int kRanks>
__device__ __forceinline__ void gather(float (&held)[kTokens], const ExpandTask& task, int base, const Part* v, unsigned mark,
                                       int lane) {
  constexpr int kWays = 32 / kRanks, kLoads = kMaxSplits / kWays;
  const Part* from = v + task.v_start + min(base + lane % kRanks, task.rank - 1);
  Part parts[kTokens][kLoads];
  bool is_ready;
  do {
    is_ready = true;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int split = lane / kRanks + n * kWays;
        parts[t][n] = static_cast<Part>(mark) << 32;
        if (t < task.num_tokens && split < task.num_splits)
          parts[t][n] = load_part(from + split * task.split_stride + t * task.v_stride);
      }
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int n = 0; n < kLoads; ++n) is_ready = is_ready && static_cast<unsigned>(parts[t][n] >> 32) == mark;
  } while (!__all_sync(~0u, is_ready));
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) sum += __uint_as_float(static_cast<unsigned>(parts[t][n]));
#pragma unroll
    for (int way = kRanks; way < 32; way *= 2) sum += __shfl_xor_sync(~0u, sum, way);
    held[t] = sum;
  }
}

// Where rank row j of B lies, in vectors.
__device__ __forceinline__ int row_vector(const ExpandTask& task, int j) {
  return static_cast<int>(__ldg(task.b_rows + min(j, task.rank - 1)) / kVectorLength);
}

// y += scaling * v B. kRanks rows of B are in flight at once; `row` is this lane's of the first ones.
template <int kTokens, int kRanks>
__device__ __forceinline__ void expand(const ExpandTask& task, int row, const Element* pool, Element* y, long long y_stride,
                                       const Part* v, unsigned mark, bool& has_waited, int lane) {
  const bool is_inside = lane * kVectorLength < task.num_columns;
  const Element* columns = pool + task.row_offset + lane * kVectorLength;
  uint4 old[kTokens];
  float sums[kTokens][8] = {};
  for (int base = 0; base < task.rank; base += kRanks) {
    uint4 b[kRanks];
#pragma unroll
    for (int i = 0; i < kRanks; ++i)
      b[i] = load_weights(columns + static_cast<long long>(__shfl_sync(~0u, row, i)) * kVectorLength,
                          is_inside && base + i < task.rank);
    if (base + kRanks < task.rank) row = row_vector(task, base + kRanks + lane % kRanks);
    if (!has_waited) {
      wait_for_previous_launch();
      has_waited = true;
    }
    if (base == 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        old[t] = load_activations(y + task.tokens[t] * y_stride + task.column + lane * kVectorLength,
                                  is_inside && t < task.num_tokens);
    }
    float held[kTokens];
    gather<kTokens, kRanks>(held, task, base, v, mark, lane);
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const unsigned* bits = &b[i].x;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float scale = __shfl_sync(~0u, held[t], i);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 f = unpack2(bits[c]);
          sums[t][2 * c] = fmaf(scale, f.x, sums[t][2 * c]);
          sums[t][2 * c + 1] = fmaf(scale, f.y, sums[t][2 * c + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (is_inside && t < task.num_tokens) {
      unsigned* bits = &old[t].x;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 f = unpack2(bits[c]);
        bits[c] = pack2(fmaf(task.scaling, sums[t][2 * c], f.x), fmaf(task.scaling, sums[t][2 * c + 1], f.y));
      }
      *reinterpret_cast<uint4*>(y + task.tokens[t] * y_stride + task.column + lane * kVectorLength) = old[t];
    }
  }
}

}  // namespace

// pool: one layer, flat. x: [tokens, x_stride]. y: [tokens, y_stride], added to in place. span: where this input's tasks lie.
// v: scratch. step: counted by write_tasks; round: tells this launch from the others of the step.
// is_ready: the launch before this one began with all that x and y need, and leaves both alone, so the two run side by side.
// The grid may be no larger than what is resident at once.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    mbgmv(const Element* pool, const Element* x, long long x_stride, Element* y, long long y_stride, const TaskSpan* span,
          const ShrinkTask* shrink_tasks, const ExpandTask* expand_tasks, Part* v, const unsigned* step, unsigned round,
          int is_ready) {
  allow_next_launch();
  const int lane = threadIdx.x & 31;
  // Neighbouring tasks go to different multiprocessors, so that few tasks still use the whole device's bandwidth.
  const int first = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
  const int num_warps = gridDim.x * (kThreads >> 5);
  const int4 bounds = *reinterpret_cast<const int4*>(span);
  const int num_shrink = bounds.y, num_expand = bounds.w;
  const unsigned mark = *step << 12 | round;
  bool has_waited = is_ready;

  int i = first;
  ShrinkLane next;
  next.load(shrink_tasks + bounds.x, i, i < num_shrink, lane);
  for (; i < num_shrink; i += num_warps) {
    const ShrinkLane task = next;
    next.load(shrink_tasks + bounds.x, i + num_warps, i + num_warps < num_shrink, lane);
    shrink(task, pool, x, x_stride, v, mark, has_waited, lane);
  }
  for (i -= num_shrink; i < num_expand; i += num_warps) {
    const ExpandTask task = expand_tasks[bounds.z + i];
    const int row = row_vector(task, lane & 15);
    if (task.num_tokens == 1) {
      expand<1, 16>(task, row, pool, y, y_stride, v, mark, has_waited, lane);
    } else {
      expand<kExpandTokens, 8>(task, row, pool, y, y_stride, v, mark, has_waited, lane);
    }
  }
  // The launch after this one takes this one's end for the end of everything before it.
  if (!has_waited || is_ready) wait_for_previous_launch();
}
