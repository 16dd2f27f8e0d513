// Taylor scores of a tile, row by row: each weight's term is computed once and added to its row and
// its column.
#pragma once

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr int kVectors = 2;               // of terms in one step, each with its own sum of the row
constexpr std::int64_t kRowAhead = 3072;  // bytes; in bf16 2048 and 4096 are slower

// What one score reads; H is float or the weights' type.
template <Score S, bool HasH, class T, class H>
struct TileLoop {
  static constexpr bool kReadsG =
      S == Score::first || S == Score::mix || S == Score::vector || (S == Score::second && !HasH);
  static constexpr bool kSquaresG = (S == Score::second || S == Score::mix) && !HasH;

  const TaylorTile tile;  // a copy: what is stored could otherwise be part of it

  template <class... N>
  LANES_INLINE F32 term(std::int64_t r, std::int64_t c, N... n) const {
    const F32 w = load(static_cast<const T*>(tile.w) + r * tile.w_stride + c, n...);
    F32 g(0.0f), h(0.0f);
    if constexpr (kReadsG) g = load(static_cast<const T*>(tile.g) + r * tile.g_stride + c, n...);
    if constexpr (kSquaresG) h = g * g;
    if constexpr (HasH) h = load(static_cast<const H*>(tile.h) + r * tile.h_stride + c, n...);
    if constexpr (S == Score::activation) h = load(tile.x + c, n...);
    return score_term<S, F32>(w, g, h);
  }

  // The terms of one vector, added to the row's sum and to the columns'.
  template <bool First, class... N>
  LANES_INLINE void add(std::int64_t r, std::int64_t c, F32& row, N... n) const {
    F32 t = term(r, c, n...);
    row = row + t;
    if constexpr (!First) t = load(tile.col_sums + c, n...) + t;
    store(t, tile.col_sums + c, n...);
  }

  // First: the column sums hold nothing yet.
  template <bool First>
  LANES_INLINE void row(std::int64_t r) const {
    F32 sums[kVectors];
    for (auto& s : sums) s = F32(0.0f);
    constexpr std::int64_t step = kVectors * kLanes;
    std::int64_t c = 0;
    for (; c + step <= tile.cols; c += step) {
      prefetch_step<T>(tile.w, r * tile.w_stride + c);
      if constexpr (kReadsG) prefetch_step<T>(tile.g, r * tile.g_stride + c);
      if constexpr (HasH) prefetch_step<H>(tile.h, r * tile.h_stride + c);
      for (int v = 0; v < kVectors; ++v) add<First>(r, c + v * kLanes, sums[v]);
    }
    for (; c + kLanes <= tile.cols; c += kLanes) add<First>(r, c, sums[0]);
    if (c < tile.cols) add<First>(r, c, sums[0], int(tile.cols - c));
    for (int v = 1; v < kVectors; ++v) sums[0] = sums[0] + sums[v];
    tile.row_sums[r] = sum(sums[0]);
  }

  LANES_INLINE void run() const {
    row<true>(0);
    for (std::int64_t r = 1; r < tile.rows; ++r) row<false>(r);
  }

 private:
  // Beyond a short row's end lie the next rows, which are needed next.
  template <class V>
  LANES_INLINE void prefetch_step(const void* base, std::int64_t at) const {
    const char* p = static_cast<const char*>(base) + at * std::int64_t(sizeof(V));
    for (std::size_t line = 0; line < kVectors * kLanes * sizeof(V); line += 64)
      prefetch(p + line, kRowAhead);
  }
};

template <Score S, class T>
void taylor_loop(const TaylorTile& tile) {
  if constexpr (S == Score::second || S == Score::mix) {
    if (!tile.h) return TileLoop<S, false, T, T>{tile}.run();
    if (tile.h_dtype == DType::f32) return TileLoop<S, true, T, float>{tile}.run();
    return TileLoop<S, true, T, T>{tile}.run();
  } else {
    return TileLoop<S, false, T, T>{tile}.run();
  }
}

void taylor_tile(const TaylorTile& tile) {
  dispatch_float(tile.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (tile.score) {
      case Score::first:
        return taylor_loop<Score::first, T>(tile);
      case Score::second:
        return taylor_loop<Score::second, T>(tile);
      case Score::mix:
        return taylor_loop<Score::mix, T>(tile);
      case Score::vector:
        return taylor_loop<Score::vector, T>(tile);
      case Score::l1:
        return taylor_loop<Score::l1, T>(tile);
      case Score::l2:
        return taylor_loop<Score::l2, T>(tile);
      case Score::activation:
        return taylor_loop<Score::activation, T>(tile);
    }
  });
}

void add_to(float* a, const float* b, std::int64_t n) {
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store(load(a + c) + load(b + c), a + c);
  if (const int rest = int(n - c); rest > 0)
    store(load(a + c, rest) + load(b + c, rest), a + c, rest);
}

void sum_rows(float* partials, std::int64_t rows, std::int64_t stride, std::int64_t cols,
              float* out) {
  for (std::int64_t step = 1; step < rows; step *= 2)
    for (std::int64_t r = 0; r + step < rows; r += 2 * step)
      add_to(partials + r * stride, partials + (r + step) * stride, cols);
  memcpy(out, partials, std::size_t(cols) * sizeof(float));
}

}  // namespace
}  // namespace fastprune::cpu
