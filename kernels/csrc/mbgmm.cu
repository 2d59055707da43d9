// MBGMM: the adapter part of linear modules for many tokens per adapter (prefill), on tensor cores, in two launches.
// S-LoRA §5 calls it Multi-size Batched Gather Matrix-Matrix multiplication.
//
// Shrink computes v = x A^T for all modules of one input at once: their rank rows stand side by side as the columns of v. Expand
// adds scaling * v B to y. v is summed in fp32 and multiplied as two numbers of the pool's dtype, so that it loses nothing that
// matters. It is handed over in the order in which the tensor cores want it: as these two, or in fp32 where expand must scale it
// first. Both run with a fixed grid over a task list.

#include "element.cuh"
#include "matrix.cuh"
#include "tasks.cuh"

namespace {

// ---- shrink: 64 tokens x 64 rank rows, in chunks of 128 input features ----

constexpr int kShrinkThreads = 256;
constexpr int kTokens = kMatrixShrinkTokens;
constexpr int kRows = kMatrixShrinkRows;
constexpr int kDepth = 128;
constexpr int kVectors = kDepth / kVectorLength;  // 16-byte vectors of a chunk's row
constexpr int kStages = 3;
constexpr int kStageBytes = (kTokens + kRows) * kDepth * 2;
constexpr int kRowStep = kShrinkThreads / kVectors;  // rows that one round of copies covers
constexpr int kTokenRounds = kTokens / kRowStep;
constexpr int kRounds = kTokenRounds + kRows / kRowStep;
constexpr int kDepthWarps = 4;  // share a chunk's features; two warps of each share its tokens
static_assert(kStages * kStageBytes >= kDepthWarps * kTokens * kRows * 4, "the warps' sums lie where the stages were");

// Byte offset of a 16-byte vector within a stage: vectors are swizzled so that ldmatrix meets no bank conflict.
__device__ __forceinline__ int stage_offset(int row, int vector) { return (row * kVectors + (vector ^ (row & 7))) * 16; }

// One 16-byte vector of each of this thread's rows. Rows that are not there come as zeros.
__device__ __forceinline__ void load_stage(unsigned stage, const Element* const (&rows)[kRounds], unsigned present, int num_rounds,
                                           int k, int end) {
  const int row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  k += vector * kVectorLength;
#pragma unroll
  for (int n = 0; n < kRounds; ++n)
    if (n < num_rounds)
      copy_async(stage + stage_offset(row + n * kRowStep, vector), k < end ? rows[n] + k : rows[n], (present >> n & 1) && k < end);
}

// Sums `num_planes` of [kTokens][kRows] and writes them as operands of expand: the high parts of pairs of rank rows, then the low
// ones. Where they must be scaled, the first of each pair, then the second.
template <bool kIsShared>
__device__ __forceinline__ void write_products(const float* planes, int num_planes, const MatrixShrinkTask& task, int row_groups,
                                               unsigned* v) {
  const int lane = threadIdx.x & 31;
  const int num_operands = (task.num_tokens + 15) / 16 * row_groups;
  for (int i = threadIdx.x >> 5; i < num_operands; i += kShrinkThreads / 32) {
    const int tile = i / row_groups, group = i % row_groups;
    unsigned first[4], second[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // both tokens of this lane for the first 8 rank rows, then for the next 8
      const int token = tile * 16 + (lane >> 2) + (e & 1) * 8, row = group * 16 + (lane & 3) * 2 + (e >> 1) * 8;
      float2 sum = make_float2(0.f, 0.f);
      for (int p = 0; p < num_planes; ++p) {
        const float2* at = reinterpret_cast<const float2*>(planes + (p * kTokens + token) * kRows + row);
        const float2 part = kIsShared ? *at : __ldcg(at);
        sum.x += part.x;
        sum.y += part.y;
      }
      if constexpr (kMustScale) {
        first[e] = __float_as_uint(sum.x);
        second[e] = __float_as_uint(sum.y);
      } else {
        split2(sum.x, sum.y, first[e], second[e]);
      }
    }
    uint4* to = reinterpret_cast<uint4*>(v + task.v_start + tile * task.v_stride + group * kMatrixStepWords) + lane * 2;
    to[0] = make_uint4(first[0], first[1], first[2], first[3]);
    to[1] = make_uint4(second[0], second[1], second[2], second[3]);
  }
}

// ---- expand: 128 tokens x 128 columns; each warp takes 16 tokens at a time ----

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = kMatrixExpandColumns;
constexpr int kRowBytes = kColumns * 2 + 16;  // of a row of B in shared memory; the padding keeps rows in different banks
constexpr int kGroups = kColumns / 32;
constexpr int kColumnVectors = kColumns / kVectorLength;

// The columns of B lie in shared memory in another order: within 32 columns, the word (two columns) j of 16-byte vector q comes
// to word q of group j. A thread's sums of four products, each of which holds two columns, are then eight neighbours of y.
__device__ __forceinline__ void store_vector(unsigned char* row, int vector, const uint4& value) {
  unsigned* to = reinterpret_cast<unsigned*>(row + vector / 4 * 64) + vector % 4;
  to[0] = value.x;
  to[4] = value.y;
  to[8] = value.z;
  to[12] = value.w;
}

// 16 tokens x 128 columns of y as one lane holds them: two tokens, and of every 32 columns eight neighbours.
struct Tile {
  Element* out[2];
  bool is_token[2];
  uint4 old[2][kGroups];
  const uint4* products;  // operands of this lane, in two parts

  __device__ __forceinline__ bool is_inside(const MatrixExpandTask& task, int m, int g, int lane) const {
    return is_token[m] && g * 32 + (lane & 3) * kVectorLength < task.num_columns;
  }

  __device__ __forceinline__ void load(const MatrixExpandTask& task, int first, Element* y, long long y_stride,
                                       const int* token_rows, const unsigned* v, int lane) {
    products = reinterpret_cast<const uint4*>(v + task.v_start + first / kMatrixStep * task.v_stride) + lane * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int token = first + (lane >> 2) + m * 8;
      is_token[m] = token < task.num_tokens;
      out[m] = y + (is_token[m] ? __ldg(token_rows + task.token_start + token) : 0) * y_stride + task.column +
               (lane & 3) * kVectorLength;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) old[m][g] = load_activations(out[m] + g * 32, is_inside(task, m, g, lane));
    }
  }

  // Adds to 32 of the columns.
  __device__ __forceinline__ void add(const MatrixExpandTask& task, int g, const float (&sums)[4][4], int lane) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned* bits = &old[m][g].x;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 f = unpack2(bits[c]);
        bits[c] = pack2(fmaf(task.scaling, sums[c][2 * m], f.x), fmaf(task.scaling, sums[c][2 * m + 1], f.y));
      }
      if (is_inside(task, m, g, lane)) *reinterpret_cast<uint4*>(out[m] + g * 32) = old[m][g];
    }
  }
};

// B of a task into shared memory, zeros up to a multiple of 16 rank rows. A few rows of each thread are on their way at once.
__device__ __forceinline__ void load_b(unsigned char* b_shared, const MatrixExpandTask& task, const Element* pool) {
  constexpr int kAtOnce = 4, kStep = kThreads / kColumnVectors;
  const int vector = threadIdx.x % kColumnVectors;
  const bool is_inside = vector * kVectorLength < task.num_columns;
  const int padded_rank = (task.rank + 15) / 16 * 16;
  for (int base = threadIdx.x / kColumnVectors; base < padded_rank; base += kAtOnce * kStep) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int j = base + n * kStep;
      const long long row = __ldg(task.b_rows + min(j, task.rank - 1));
      values[n] = load_weights(pool + row + task.row_offset + vector * kVectorLength, is_inside && j < task.rank);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (base + n * kStep < padded_rank) store_vector(b_shared + (base + n * kStep) * kRowBytes, vector, values[n]);
  }
}

// v of 16 tokens and 16 rank rows as one lane holds it: 4 rank rows of two tokens.
struct Operand {
  uint4 high, low;
  float back[2];  // of each token, if it must be scaled

  __device__ __forceinline__ Operand(const uint4& first, const uint4& second) : high(first), low(second) {
    if constexpr (kMustScale) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float2 pairs[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          pairs[h] = make_float2(__uint_as_float((&first.x)[m + 2 * h]), __uint_as_float((&second.x)[m + 2 * h]));
        const float largest = fmaxf(fmaxf(fabsf(pairs[0].x), fabsf(pairs[0].y)), fmaxf(fabsf(pairs[1].x), fabsf(pairs[1].y)));
        const float2 scale = scale_and_back(largest_of_four(largest));
#pragma unroll
        for (int h = 0; h < 2; ++h)
          split2(scale.x * pairs[h].x, scale.x * pairs[h].y, (&high.x)[m + 2 * h], (&low.x)[m + 2 * h]);
        back[m] = scale.y;
      }
    }
  }
};

// y += scaling * v B for 16 tokens and 128 columns, 32 columns at a time.
__device__ __forceinline__ void multiply(Tile& tile, const MatrixExpandTask& task, const unsigned char* b_shared, int lane) {
  const Operand first(__ldcg(tile.products), __ldcg(tile.products + 1));
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float sums[4][4] = {};
    Operand v = first;
    for (int base = 0; base < task.rank; base += kMatrixStep) {
      if (base > 0) {
        const uint4* products = tile.products + base / kMatrixStep * (kMatrixStepWords / 4);
        v = Operand(products[0], products[1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned b[4];
        load_matrix4_transposed(
            b, shared_address(b_shared + (base + (lane & 15)) * kRowBytes + (g * 32 + half * 16 + (lane >> 4) * 8) * 2));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float scaled[4] = {};
          float(&sum)[4] = kMustScale ? scaled : sums[half * 2 + n];
          multiply_add(sum, v.high.x, v.high.y, v.high.z, v.high.w, b[2 * n], b[2 * n + 1]);
          multiply_add(sum, v.low.x, v.low.y, v.low.z, v.low.w, b[2 * n], b[2 * n + 1]);
          if constexpr (kMustScale)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[half * 2 + n][e] = fmaf(v.back[e >> 1], scaled[e], sums[half * 2 + n][e]);
        }
      }
    }
    tile.add(task, g, sums, lane);
  }
}

}  // namespace

// pool: one layer, flat. x: [tokens, x_stride]. span: where this input's tasks lie.
// rank_rows: where rank rows of A lie, in vectors. v: written. partials, [tiles, slices, kTokens, kRows] fp32, and counters,
// [tiles], zero before and after: for products that are split into slices; the last thread block of a tile to finish sums them.
// Needs kStages * kStageBytes of shared memory.
extern "C" __global__ void __launch_bounds__(kShrinkThreads, 2)
    mbgmm_shrink(const Element* pool, const Element* x, long long x_stride, const TaskSpan* span, const MatrixShrinkTask* tasks,
                 const int* rank_rows, const int* token_rows, unsigned* v, float* partials, unsigned* counters) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ bool is_last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int my_tokens = (warp & 1) * 32, my_depth = warp >> 1;
  const unsigned base = shared_address(stages);
  float* const sums_shared = reinterpret_cast<float*>(stages);
  const int4 bounds = *reinterpret_cast<const int4*>(span);
  const int num_splits = span->num_splits;
  wait_for_previous_launch();
  // Only now: whoever starts after this launch may rely on all that came before it.
  allow_next_launch();
  for (int i = blockIdx.x; i < bounds.y; i += gridDim.x) {
    const MatrixShrinkTask task = tasks[bounds.x + i];
    const Element* rows[kRounds];
    unsigned present = 0;
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      const int row = threadIdx.x / kVectors + n * kRowStep;
      rows[n] = pool;
      if (n < kTokenRounds) {
        if (row < task.num_tokens) {
          rows[n] = x + token_rows[task.token_start + row] * x_stride;
          present |= 1u << n;
        }
      } else if (row - kTokens < task.num_rows) {
        const int vector = rank_rows[task.row_start + row - kTokens];
        if (vector >= 0) {
          rows[n] = pool + static_cast<long long>(vector) * kVectorLength;
          present |= 1u << n;
        }
      }
    }
    const int row_groups = (task.num_rows + 15) / 16;
    const int num_rounds = kTokenRounds + row_groups * 16 / kRowStep;
    const int num_chunks = (task.end - task.begin + kDepth - 1) / kDepth;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < num_chunks) load_stage(base + s * kStageBytes, rows, present, num_rounds, task.begin + s * kDepth, task.end);
      commit_copies();
    }
    float sums[2][kRows / 8][4] = {};
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int next = chunk + kStages - 1;
      if (next < num_chunks)
        load_stage(base + next % kStages * kStageBytes, rows, present, num_rounds, task.begin + next * kDepth, task.end);
      commit_copies();
      const unsigned stage = base + chunk % kStages * kStageBytes;
#pragma unroll
      for (int n = 0; n < kDepth / 16 / kDepthWarps; ++n) {
        const int vector = 2 * (my_depth + n * kDepthWarps);
        unsigned a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) load_matrix4(a[m], stage + stage_offset(my_tokens + m * 16 + (lane & 15), vector + (lane >> 4)));
#pragma unroll
        for (int g = 0; g < kRows / 16; ++g) {
          if (g < row_groups) {
            // rank rows g * 16 .. + 15 as two groups of 8 columns, each with two halves of the features
            unsigned b[4];
            load_matrix4(b,
                         stage + stage_offset(kTokens + g * 16 + (lane & 7) + ((lane >> 4) << 3), vector + ((lane >> 3) & 1)));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              multiply_add(sums[m][2 * g], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
              multiply_add(sums[m][2 * g + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
            }
          }
        }
      }
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
        if (n / 2 < row_groups)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = my_tokens + m * 16 + (lane >> 2) + e * 8, row = n * 8 + (lane & 3) * 2;
            *reinterpret_cast<float2*>(sums_shared + (my_depth * kTokens + token) * kRows + row) =
                make_float2(sums[m][n][2 * e], sums[m][n][2 * e + 1]);
          }
    __syncthreads();
    if (num_splits == 1) {
      write_products<true>(sums_shared, kDepthWarps, task, row_groups, v);
    } else {
      const int tile = i / num_splits;
      float* of_tile = partials + static_cast<long long>(tile) * num_splits * kTokens * kRows;
      float* mine = of_tile + i % num_splits * kTokens * kRows;
      for (int j = threadIdx.x; j < kTokens * kRows; j += kShrinkThreads) {
        if (j % kRows >= row_groups * 16) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kDepthWarps; ++w) sum += sums_shared[w * kTokens * kRows + j];
        __stcg(mine + j, sum);
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        is_last = atomicAdd(counters + tile, 1u) + 1 == static_cast<unsigned>(num_splits);
        if (is_last) counters[tile] = 0;
      }
      __syncthreads();
      if (is_last) {
        __threadfence();
        write_products<false>(of_tile, num_splits, task, row_groups, v);
      }
    }
    __syncthreads();
  }
}

// y: [tokens, y_stride], added to in place. Needs kRowBytes of shared memory for each rank row, in multiples of 16 rows.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    mbgmm_expand(const Element* pool, Element* y, long long y_stride, const TaskSpan* span, const MatrixExpandTask* tasks,
                 const int* token_rows, const unsigned* v) {
  extern __shared__ __align__(128) unsigned char b_shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int4 bounds = *reinterpret_cast<const int4*>(span);
  allow_next_launch();
  bool has_waited = false;
  for (int i = blockIdx.x; i < bounds.w; i += gridDim.x) {
    const MatrixExpandTask task = tasks[bounds.z + i];
    Tile tile;
    if (has_waited) tile.load(task, warp * 16, y, y_stride, token_rows, v, lane);
    load_b(b_shared, task, pool);
    if (!has_waited) {
      wait_for_previous_launch();
      has_waited = true;
      tile.load(task, warp * 16, y, y_stride, token_rows, v, lane);
    }
    __syncthreads();
    for (int first = warp * 16; first < task.num_tokens; first += kWarps * 16) {
      if (first != warp * 16) tile.load(task, first, y, y_stride, token_rows, v, lane);
      multiply(tile, task, b_shared, lane);
    }
    __syncthreads();
  }
  if (!has_waited) wait_for_previous_launch();
}
