// Keeps the likeliest tokens of each row of weights: the top_k largest weights, and of these the fewest whose sum reaches the share
// top_p of theirs. The others become 0. Of equal weights those of the lowest token ids stay.
//
// One thread block does one row, and sorts nothing: it searches for the smallest weight that stays. Each pass over the row sums, or
// counts, what lies above each of eight pivots, which leaves an eighth of the interval to search, or less. Weights are integers, so
// a sum is the same in whatever order it is added.
//
// Token i is read and written by thread i % kThreads alone, so passes need no barrier between them for the row's sake.

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPivots = 8;
constexpr int kInFlight = 4;  // weights that a thread loads at once
constexpr unsigned kAllLanes = 0xffffffffu;

using Weight = long long;
constexpr Weight kInfinity = 0x7fffffffffffffffLL;

// What one pass finds of the tokens with low <= weight < high.
enum Found { kSmallest = kPivots, kLargest, kNumFound };  // before these, the measure of each pivot's tokens

struct Scratch {
  Weight of_warp[kNumFound][kWarps];
  Weight of_block[kNumFound];
  int equal_in_warp[2][kWarps];
};

__device__ __forceinline__ Weight pivot_step(Weight low, Weight high) { return max((high - low) / kPivots, Weight(1)); }

__device__ __forceinline__ Weight larger_or_sum(int i, Weight a, Weight b) { return i < kPivots ? a + b : max(a, b); }

// Pivot i is low + i * pivot_step. Measures, for each pivot, the tokens with a weight from there up to high: how many, or their sum.
// Returns these, then minus the smallest weight of the interval, and the largest; the same to every thread.
template <bool kCounts>
__device__ const Weight* survey(const Weight* row, int vocab, Weight low, Weight high, Scratch& scratch) {
  const Weight step = pivot_step(low, high);
  Weight found[kNumFound] = {};
  found[kSmallest] = found[kLargest] = -kInfinity;
  for (int first = threadIdx.x; first < vocab; first += kInFlight * kThreads) {
    Weight weights[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int token = first + i * kThreads;
      weights[i] = token < vocab ? row[token] : 0;  // 0 lies in no interval
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Weight weight = weights[i];
      if (weight < low || weight >= high) continue;
#pragma unroll
      for (int pivot = 0; pivot < kPivots; ++pivot) {
        if (weight >= low + pivot * step) found[pivot] += kCounts ? 1 : weight;
      }
      found[kSmallest] = max(found[kSmallest], -weight);
      found[kLargest] = max(found[kLargest], weight);
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kNumFound; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) {
      found[i] = larger_or_sum(i, found[i], __shfl_xor_sync(kAllLanes, found[i], distance));
    }
    if (lane == 0) scratch.of_warp[i][warp] = found[i];
  }
  __syncthreads();
  if (threadIdx.x < kNumFound) {
    Weight all = scratch.of_warp[threadIdx.x][0];
    for (int i = 1; i < kWarps; ++i) all = larger_or_sum(threadIdx.x, all, scratch.of_warp[threadIdx.x][i]);
    scratch.of_block[threadIdx.x] = all;
  }
  __syncthreads();
  return scratch.of_block;
}

// Clears every weight below `least`.
__device__ void clear_below(Weight* row, int vocab, Weight least) {
  for (int token = threadIdx.x; token < vocab; token += kThreads) {
    const Weight weight = row[token];
    if (weight > 0 && weight < least) row[token] = 0;
  }
}

// Of the weights that are `weight`, clears all but the first num_kept.
__device__ void clear_equal(Weight* row, int vocab, Weight weight, Weight num_kept, Scratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Weight num_before = 0;
  int turn = 0;
  for (int first = 0; first < vocab; first += kThreads, turn ^= 1) {
    const int token = first + threadIdx.x;
    const bool is_equal = token < vocab && row[token] == weight;
    const unsigned equal = __ballot_sync(kAllLanes, is_equal);
    if (lane == 0) scratch.equal_in_warp[turn][warp] = __popc(equal);
    __syncthreads();  // one is enough: what is read after it is overwritten only after the next
    Weight rank = num_before + __popc(equal & ((1u << lane) - 1));
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) rank += scratch.equal_in_warp[turn][i];
      num_before += scratch.equal_in_warp[turn][i];
    }
    if (is_equal && rank >= num_kept) row[token] = 0;
  }
}

// Keeps the fewest of the largest weights that are `wanted` many, or whose sum reaches `share` of the row's.
template <bool kCounts>
__device__ void keep_largest(Weight* row, int vocab, Weight wanted, double share, Scratch& scratch) {
  const Weight* found = survey<kCounts>(row, vocab, 1, kInfinity, scratch);
  const Weight total = found[0];
  if (!kCounts) wanted = max(static_cast<Weight>(ceil(share * static_cast<double>(total))), Weight(1));
  if (total <= wanted) return;
  // Tokens from low up reach what is wanted; those from high up do not. `above` is the measure of these, `inside` of the others.
  Weight low = -found[kSmallest], high = found[kLargest] + 1, above = 0, inside = total;
  while (high - low > 1) {
    found = survey<kCounts>(row, vocab, low, high, scratch);
    const Weight step = pivot_step(low, high);
    int pivot = kPivots - 1;
    while (pivot > 0 && above + found[pivot] < wanted) --pivot;
    inside = found[pivot];
    if (pivot + 1 < kPivots) {
      inside -= found[pivot + 1];
      above += found[pivot + 1];
      high = min(high, low + (pivot + 1) * step);
    }
    // No weight lies outside of what was found, so a single one ends the search.
    low = max(low + pivot * step, -found[kSmallest]);
    high = min(high, found[kLargest] + 1);
  }
  clear_below(row, vocab, low);
  const Weight num_kept = kCounts ? wanted - above : (wanted - above + low - 1) / low;
  const Weight num_equal = kCounts ? inside : inside / low;
  if (num_kept < num_equal) clear_equal(row, vocab, low, num_kept, scratch);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    truncate_rows(Weight* weights, const Weight* top_k, const double* top_p, int vocab) {
  __shared__ Scratch scratch;
  Weight* row = weights + static_cast<Weight>(blockIdx.x) * vocab;
  if (top_k[blockIdx.x] < vocab) keep_largest<true>(row, vocab, top_k[blockIdx.x], 1.0, scratch);
  if (top_p[blockIdx.x] < 1.0) keep_largest<false>(row, vocab, 0, top_p[blockIdx.x], scratch);
}
