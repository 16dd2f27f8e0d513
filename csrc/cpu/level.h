// The loops that are compiled once per instruction-set level, and the table that picks one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/math.h"
#include "core/ops.h"

namespace fastprune::cpu {

// Scores of a block of a matrix. Pointers are at its first element; row strides in elements.
struct TaylorTile {
  Score score;
  DType dtype, h_dtype;   // of w and g; of h
  const void *w, *g, *h;  // nullptr where the score does not read it
  std::int64_t w_stride, g_stride, h_stride;
  const float* x;
  std::int64_t rows, cols;
  float* row_sums;  // (rows,)
  float* col_sums;  // (cols,)
};

// One block of a column gather: `lanes` outputs picked from two adjacent vectors at src + base.
// base < 0: the columns are too far apart and are copied one by one.
struct ColumnGather {
  int item_size;               // 2 or 4
  std::int64_t kept;           // columns kept, at least one vector
  std::int64_t blocks;         // each one vector of outputs; the last may overlap its predecessor
  const std::int64_t* base;    // (blocks,)
  const std::int64_t* ahead;   // (blocks,) column of a later block to ask for; past the row: below
  const std::uint16_t* picks;  // (blocks, lanes), in [0, 2 * lanes)
  const std::int64_t* index;   // (kept,)
};

// Sums over one chunk of a tensor; moments, min and max over finite values.
struct ScanPart {
  double nan, inf, zeros, min, max, sum, squares;
};

struct NormPart {
  double squares, nonfinite;
};

struct AdamWChunk {
  void* w;
  const void* g;
  float *m, *v, *master;
  DType w_dtype, g_dtype;
  std::int64_t n;
  Master mode;
  AdamWFactors factors;
  std::uint32_t first, key;  // random bits: low index of the first element, key of the tensor
};

// Sum of exp(x - shift) over a row of logits; shift is its largest value, or 0 where that is -inf.
struct ExpSum {
  float shift;
  double sum;
};

struct Level {
  const char* name;
  int vector_bytes;
  void (*taylor_tile)(const TaylorTile&);
  // out[c] = sum over r of partials[r * stride + c], by a fixed tree; partials is overwritten.
  void (*sum_rows)(float* partials, std::int64_t rows, std::int64_t stride, std::int64_t cols,
                   float* out);
  // `stream`: write past the caches, which saves reading what is overwritten; end with `settle`.
  void (*copy)(void* dst, const void* src, std::int64_t bytes, bool stream);
  // Row strides in elements of plan.item_size; the rows of dst are adjacent.
  void (*gather_columns)(const ColumnGather&, const void* src, std::int64_t src_stride, void* dst,
                         std::int64_t rows, bool stream);
  void (*settle)();
  ScanPart (*scan_chunk)(DType, const void* x, std::int64_t n);
  // Values further than `limit` from `mean`; non-finite values do not count.
  std::int64_t (*count_outliers)(DType, const void* x, std::int64_t n, float mean, float limit);
  NormPart (*norm_chunk)(DType, const void* g, std::int64_t n, float factor);
  void (*adamw_chunk)(const AdamWChunk&);
  ExpSum (*exp_sum)(DType, const void* x, std::int64_t n);
  // x = scale * (exp(x - shift) / sum - onehot(target))
  void (*softmax_minus_onehot)(DType, void* x, std::int64_t n, const ExpSum&, float scale,
                               std::int64_t target);
  float (*value)(DType, const void* x, std::int64_t i);  // x[i]
};

#if defined(__x86_64__)
extern const Level level_v2, level_v3, level_v4;
const Level& level_amx();  // the loops of v4; attention multiplies by AMX
#else
extern const Level level_generic;
#endif

// Names of the levels this machine can run, lowest first.
std::vector<std::string> usable_levels();
// The level in use: the highest usable one until another is chosen.
const Level& level();
// Throws std::invalid_argument for a level this machine cannot run.
void choose_level(const std::string& name);

}  // namespace fastprune::cpu
