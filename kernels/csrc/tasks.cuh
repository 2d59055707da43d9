// The step plan on the device: what the host uploads, and the tasks that step_plan.cu makes of it.
// Layouts are mirrored in kernels/plan_layout.py. Row offsets are in vectors of 8 elements from the start of a layer's pool.
#pragma once

constexpr int kVectorLength = 8;     // elements of 16 bytes
constexpr int kTileTokens = 8;       // MBGMV: tokens of a tile; they share an adapter
constexpr int kTileRows = 16;        // MBGMV: rank rows of a shrink task
constexpr int kTokenColumns = 1024;  // MBGMV: columns of y of an expand task for one token
constexpr int kTileColumns = 512;    // MBGMV: and of one for several
constexpr int kMaxSplits = 8;        // MBGMV: shrink tasks that share a dot product, each with a slice of it

constexpr int kMatrixShrinkTokens = 64;
constexpr int kMatrixShrinkRows = 64;
constexpr int kMatrixExpandTokens = 128;
constexpr int kMatrixStep = 16;         // MBGMM: tokens and rank rows of an operand of the tensor cores
constexpr int kMatrixStepWords = 256;   // 32-bit words of that operand of v, in two parts: see mbgmm.cu

constexpr int kMatrixExpandColumns = 128;

// ---- uploaded by the host ----

struct TaskSpan {  // where the tasks of one input (q, k and v; o; gate and up; down) lie in the task lists
  int shrink_start;
  int num_shrink;
  int expand_start;
  int num_expand;
  int num_splits;    // into how many slices of in_features a dot product is split
  int slice_length;  // features of a slice
  int pad[2];
};

struct PlanHeader {
  int num_tiles;
  int tiles_at;  // offsets in ints from the start of the plan
  int num_segments;
  int segments_at;
  int entries_at;
  int pad[3];
  // then, for each group, a TaskSpan of MBGMV and one of MBGMM; then the rows of the tokens, grouped by adapter
};

struct AdapterEntry {  // one adapter and module
  const long long* a_rows;  // [rank] element offsets
  const long long* b_rows;
  int rank;  // 0: the adapter leaves the module alone
  float scaling;
};

// A tile (MBGMV), or a segment (MBGMM: all tokens of one adapter). Followed by, for each group, {shrink_start, v_start,
// row_start}, and for each target, expand_start.
struct Piece {
  int entry;  // first of its adapter's entries
  int token_start;
  int num_tokens;
  int pad;
};

struct GroupShape {
  int first_target;
  int num_targets;
  int in_features;
  int pad;
};

struct TargetShape {
  int out_start;
  int out_features;
  int pad[2];
};

// ---- written by step_plan.cu ----

// Up to 16 rank rows of A, of all modules of one input, times one slice of x for the tokens of a tile.
struct ShrinkTask {
  int rows[kTileRows];      // -1: none
  int tokens[kTileTokens];  // rows of x, -1: none
  int begin;                // features of the slice
  int end;
  int v_start;   // v[v_start + t * v_stride + row] takes the product of token t
  int v_stride;
  int pad[4];
};

// Some columns of one module's y, for the tokens of a tile.
struct ExpandTask {
  const long long* b_rows;
  int row_offset;  // first of these columns within a row of B transposed
  int rank;
  int tokens[kTileTokens];  // rows of y; the first one again where there is none
  int v_start;  // v[v_start + s * split_stride + t * v_stride + j] is the part of slice s
  int v_stride;
  int split_stride;
  int num_splits;
  int column;  // first column of y
  int num_columns;
  float scaling;
  int num_tokens;
};

// Up to 64 rank rows, of all modules of one input, times one slice of x for up to 64 tokens of one adapter. Tasks of the slices
// of one product follow one another.
struct MatrixShrinkTask {
  int row_start;  // in `rank_rows`, where each module begins at a multiple of 16
  int num_rows;
  int token_start;
  int num_tokens;
  int v_start;   // v[v_start + (t / 16) * v_stride + (row / 16) * kMatrixStepWords] is the operand of 16 tokens and 16 rank rows
  int v_stride;
  int begin;  // features of the slice
  int end;
};

// Up to 128 columns of one module's y for up to 128 tokens of one adapter.
struct MatrixExpandTask {
  const long long* b_rows;
  int row_offset;
  int rank;
  int token_start;
  int num_tokens;
  int v_start;
  int v_stride;
  int column;
  int num_columns;
  float scaling;
  int pad;
};

static_assert(sizeof(PlanHeader) == 32 && sizeof(TaskSpan) == 32 && sizeof(Piece) == 16 && sizeof(AdapterEntry) == 24, "plan");
static_assert(sizeof(ShrinkTask) == 128, "SHRINK_TASK_BYTES");
static_assert(sizeof(ExpandTask) == 80, "EXPAND_TASK_BYTES");
static_assert(sizeof(MatrixShrinkTask) == 32, "MATRIX_SHRINK_TASK_BYTES");
static_assert(sizeof(MatrixExpandTask) == 48, "MATRIX_EXPAND_TASK_BYTES");
