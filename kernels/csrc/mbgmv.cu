// MBGMV: the adapter part of linear modules for few tokens per adapter (decode), in one launch.
// S-LoRA §5 calls it Multi-size Batched Gather Matrix-Vector multiplication.
//
// A warp does one shrink task at a time: up to 16 rank rows of A times one slice of x for up to 8 tokens, on tensor cores. Then a
// thread block does one expand task at a time: it adds to up to 1024 columns of y for one token, or to up to 512 for up to 8, on
// tensor cores again. Tasks are dealt out in order, and who has no shrink task expands at once, so that memory stays busy across
// what would otherwise be a kernel boundary.
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
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;
constexpr int kSteps = 8;  // of 32 features, in flight at once
static_assert(kTileRows == 16 && kTileTokens == 8, "rows and columns of a product on the tensor cores");
static_assert(kTokenColumns == kThreads * kVectorLength, "a vector of columns each");
static_assert(kTileColumns % (kWarps * 64) == 0, "whole parts of 64 columns for each warp: a vector for every four lanes");
static_assert(kMaxSplits % 2 == 0, "two lanes share the slices of a product");

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

// Lane i gets v of rank row `base + i % 16`, summed over the slices, as soon as all are there.
__device__ __forceinline__ float gather(const ExpandTask& task, int base, const Part* v, unsigned mark, int lane) {
  constexpr int kLoads = kMaxSplits / 2;
  const Part* from = v + task.v_start + min(base + (lane & 15), task.rank - 1);
  Part parts[kLoads];
  bool is_ready;
  do {
    is_ready = true;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int split = (lane >> 4) + 2 * n;
      parts[n] = split < task.num_splits ? load_part(from + split * task.split_stride) : static_cast<Part>(mark) << 32;
    }
#pragma unroll
    for (int n = 0; n < kLoads; ++n) is_ready = is_ready && static_cast<unsigned>(parts[n] >> 32) == mark;
  } while (!__all_sync(~0u, is_ready));
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kLoads; ++n) sum += __uint_as_float(static_cast<unsigned>(parts[n]));
  return sum + __shfl_xor_sync(~0u, sum, 16);
}

// Where rank row j of B lies, in vectors.
__device__ __forceinline__ int row_vector(const ExpandTask& task, int j) {
  return static_cast<int>(__ldg(task.b_rows + min(j, task.rank - 1)) / kVectorLength);
}

// y += scaling * v B for one token. 16 rows of B are in flight at once; `row` is where the one of lane % 16 lies.
__device__ __forceinline__ void expand_token(const ExpandTask& task, int row, const Element* pool, Element* y, long long y_stride,
                                             const Part* v, unsigned mark, bool& has_waited, int lane) {
  const int column = threadIdx.x * kVectorLength;
  const bool is_inside = column < task.num_columns;
  const Element* columns = pool + task.row_offset + column;
  Element* const out = y + task.tokens[0] * y_stride + task.column + column;
  uint4 old;
  float sums[8] = {};
  for (int base = 0; base < task.rank; base += 16) {
    uint4 b[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      b[i] = load_weights(columns + static_cast<long long>(__shfl_sync(~0u, row, i)) * kVectorLength,
                          is_inside && base + i < task.rank);
    if (base + 16 < task.rank) row = row_vector(task, base + 16 + (lane & 15));
    if (!has_waited) {
      wait_for_previous_launch();
      has_waited = true;
    }
    if (base == 0) old = load_activations(out, is_inside);
    const float held = gather(task, base, v, mark, lane);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const unsigned* bits = &b[i].x;
      const float scale = __shfl_sync(~0u, held, i);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 f = unpack2(bits[c]);
        sums[2 * c] = fmaf(scale, f.x, sums[2 * c]);
        sums[2 * c + 1] = fmaf(scale, f.y, sums[2 * c + 1]);
      }
    }
  }
  if (is_inside) {
    unsigned* bits = &old.x;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 f = unpack2(bits[c]);
      bits[c] = pack2(fmaf(task.scaling, sums[2 * c], f.x), fmaf(task.scaling, sums[2 * c + 1], f.y));
    }
    *reinterpret_cast<uint4*>(out) = old;
  }
}

// v of 16 rank rows for the tokens of a tile, summed over the slices, for the whole thread block: each thread gets one of them as
// soon as its slices are there. 0 where there is no token, or no rank row. [kTileTokens][16].
__device__ __forceinline__ void gather_tile(float* held, const ExpandTask& task, int base, const Part* v, unsigned mark) {
  static_assert(kThreads == kTileTokens * 16, "a thread each");
  const int token = threadIdx.x >> 4, row = base + (threadIdx.x & 15);
  const Part* from = v + task.v_start + token * task.v_stride + row;
  const int num_splits = token < task.num_tokens && row < task.rank ? task.num_splits : 0;
  Part parts[kMaxSplits];
  bool is_ready;
  do {
    is_ready = true;
#pragma unroll
    for (int n = 0; n < kMaxSplits; ++n)
      parts[n] = n < num_splits ? load_part(from + n * task.split_stride) : static_cast<Part>(mark) << 32;
#pragma unroll
    for (int n = 0; n < kMaxSplits; ++n) is_ready = is_ready && static_cast<unsigned>(parts[n] >> 32) == mark;
  } while (!__all_sync(~0u, is_ready));
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kMaxSplits; ++n) sum += __uint_as_float(static_cast<unsigned>(parts[n]));
  held[threadIdx.x] = sum;
}

// y += scaling * v B for up to 8 tokens, on tensor cores: 16 columns of y are the rows of a product, the tokens its columns. The
// order of columns is free, and that of rank rows within a product too: each lane loads 8 neighbouring columns of 4 rank rows, as
// the operands of 4 products, and gets the sums of the same 8 columns for two of the tokens. v is split into what the pool's
// dtype holds and what that leaves out, so that it loses nothing that matters; where it must be scaled first, 16 rank rows of each
// token are at a time.
__device__ __forceinline__ void expand_tile(const ExpandTask& task, const int* tokens, int row, const Element* pool, Element* y,
                                            long long y_stride, const Part* v, unsigned mark, float (*held)[kThreads], int& turn,
                                            bool& has_waited, int lane) {
  constexpr int kParts = kTileColumns / kWarps / 64;  // of 64 columns
  const int quad = lane & 3, column = (threadIdx.x >> 5) * (kTileColumns / kWarps) + (lane >> 2) * kVectorLength;
  const Element* columns = pool + task.row_offset + column;
  const int2 pair = *reinterpret_cast<const int2*>(tokens + 2 * quad);
  Element* const out[2] = {y + pair.x * y_stride + task.column + column, y + pair.y * y_stride + task.column + column};
  uint4 old[2][kParts];
  float sums[kParts][4][4] = {};
  for (int base = 0; base < task.rank; base += 16) {
    uint4 b[4][kParts];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Element* from = columns + static_cast<long long>(__shfl_sync(~0u, row, 4 * quad + r)) * kVectorLength;
#pragma unroll
      for (int p = 0; p < kParts; ++p)
        b[r][p] = load_weights(from + 64 * p, base + 4 * quad + r < task.rank && 64 * p + column < task.num_columns);
    }
    if (base + 16 < task.rank) row = row_vector(task, base + 16 + (lane & 15));
    if (!has_waited) {
      wait_for_previous_launch();
      has_waited = true;
    }
    if (base == 0) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int p = 0; p < kParts; ++p)
          old[m][p] = load_activations(out[m] + 64 * p, 2 * quad + m < task.num_tokens && 64 * p + column < task.num_columns);
    }
    // Two buffers in turn: who is slow may still read what was gathered last.
    turn ^= 1;
    gather_tile(held[turn], task, base, v, mark);
    __syncthreads();
    float4 mine = *reinterpret_cast<const float4*>(held[turn] + (lane >> 2) * 16 + 4 * quad);
    float back[2];  // for the tokens of this lane's sums
    if constexpr (kMustScale) {
      const float largest = fmaxf(fmaxf(fabsf(mine.x), fabsf(mine.y)), fmaxf(fabsf(mine.z), fabsf(mine.w)));
      const float2 scale = scale_and_back(largest_of_four(largest));
      mine = make_float4(scale.x * mine.x, scale.x * mine.y, scale.x * mine.z, scale.x * mine.w);
#pragma unroll
      for (int m = 0; m < 2; ++m) back[m] = __shfl_sync(~0u, scale.y, (2 * quad + m) * 4);
    }
    unsigned high[2], low[2];
    split2(mine.x, mine.y, high[0], low[0]);
    split2(mine.z, mine.w, high[1], low[1]);
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned w0 = (&b[0][p].x)[i], w1 = (&b[1][p].x)[i], w2 = (&b[2][p].x)[i], w3 = (&b[3][p].x)[i];
        // Of the even column, then of the odd one, two rank rows each.
        const unsigned a0 = __byte_perm(w0, w1, 0x5410), a1 = __byte_perm(w0, w1, 0x7632);
        const unsigned a2 = __byte_perm(w2, w3, 0x5410), a3 = __byte_perm(w2, w3, 0x7632);
        float scaled[4] = {};
        float(&sum)[4] = kMustScale ? scaled : sums[p][i];
        multiply_add(sum, a0, a1, a2, a3, high[0], high[1]);
        multiply_add(sum, a0, a1, a2, a3, low[0], low[1]);
        if constexpr (kMustScale)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[p][i][e] = fmaf(back[e & 1], scaled[e], sums[p][i][e]);
      }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      unsigned* bits = &old[m][p].x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = unpack2(bits[i]);
        bits[i] = pack2(fmaf(task.scaling, sums[p][i][m], f.x), fmaf(task.scaling, sums[p][i][m + 2], f.y));
      }
      if (2 * quad + m < task.num_tokens && 64 * p + column < task.num_columns)
        *reinterpret_cast<uint4*>(out[m] + 64 * p) = old[m][p];
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
  __shared__ __align__(16) float held[2][kThreads];
  int turn = 0;
  allow_next_launch();
  const int lane = threadIdx.x & 31;
  // Neighbouring tasks go to different multiprocessors, so that few tasks still use the whole device's bandwidth.
  const int first = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
  const int num_warps = gridDim.x * kWarps;
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
  // Thread blocks that have had no shrink task begin.
  for (i = (blockIdx.x + gridDim.x - num_shrink % gridDim.x) % gridDim.x; i < num_expand; i += gridDim.x) {
    const ExpandTask task = expand_tasks[bounds.z + i];
    const int row = row_vector(task, lane & 15);
    if (task.num_tokens == 1) {
      expand_token(task, row, pool, y, y_stride, v, mark, has_waited, lane);
    } else {
      // Not from the copy: which tokens a lane has is not known to the compiler, which would keep the copy in memory.
      const int* tokens = expand_tasks[bounds.z + i].tokens;
      expand_tile(task, tokens, row, pool, y, y_stride, v, mark, held, turn, has_waited, lane);
    }
  }
  // The launch after this one takes this one's end for the end of everything before it.
  if (!has_waited || is_ready) wait_for_previous_launch();
}
