// Taylor scores of a tile: each weight's term is computed once and added to its row and its column.
#pragma once

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr int kRowsAtOnce = 4;  // rows that share one load and store of a column's sum

// What one score reads; H is float or the weights' type.
template <Score S, bool HasH, class T, class H>
struct TileLoop {
  static constexpr bool kReadsG =
      S == Score::first || S == Score::mix || S == Score::vector || (S == Score::second && !HasH);
  static constexpr bool kSquaresG = (S == Score::second || S == Score::mix) && !HasH;

  const TaylorTile& tile;

  template <class V, class... N>
  LANES_INLINE F32 fetch(const void* base, std::int64_t stride, std::int64_t r, std::int64_t c,
                         N... n) const {
    const V* p = static_cast<const V*>(base) + r * stride + c;
    // What comes next in this place is kRowsAtOnce rows below, if there are rows.
    const std::int64_t below = kRowsAtOnce * stride * std::int64_t(sizeof(V));
    prefetch(p, tile.rows > kRowsAtOnce ? below : kAhead);
    return load(p, n...);
  }

  template <class... N>
  LANES_INLINE F32 term(std::int64_t r, std::int64_t c, N... n) const {
    const F32 w = fetch<T>(tile.w, tile.w_stride, r, c, n...);
    F32 g(0.0f), h(0.0f);
    if constexpr (kReadsG) g = fetch<T>(tile.g, tile.g_stride, r, c, n...);
    if constexpr (kSquaresG) h = g * g;
    if constexpr (HasH) h = fetch<H>(tile.h, tile.h_stride, r, c, n...);
    if constexpr (S == Score::activation) h = load(tile.x + c, n...);
    return score_term<S, F32>(w, g, h);
  }

  // Rows r to r + R; `fresh`: the column sums hold nothing yet.
  template <int R, class... N>
  LANES_INLINE void column(std::int64_t r, std::int64_t c, bool fresh, F32 (&row)[R],
                           N... n) const {
    F32 terms[R];
    for (int i = 0; i < R; ++i) {
      terms[i] = term(r + i, c, n...);
      row[i] = row[i] + terms[i];
    }
    for (int half = R / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) terms[i] = terms[i] + terms[i + half];
    if (!fresh) terms[0] = load(tile.col_sums + c, n...) + terms[0];
    store(terms[0], tile.col_sums + c, n...);
  }

  template <int R>
  LANES_INLINE void rows(std::int64_t r, bool fresh) const {
    F32 row[R];
    for (int i = 0; i < R; ++i) row[i] = F32(0.0f);
    std::int64_t c = 0;
    for (; c + kLanes <= tile.cols; c += kLanes) column<R>(r, c, fresh, row);
    if (c < tile.cols) column<R>(r, c, fresh, row, int(tile.cols - c));
    for (int i = 0; i < R; ++i) tile.row_sums[r + i] = sum(row[i]);
  }

  void run() const {
    std::int64_t r = 0;
    for (; r + kRowsAtOnce <= tile.rows; r += kRowsAtOnce) rows<kRowsAtOnce>(r, r == 0);
    for (; r < tile.rows; ++r) rows<1>(r, r == 0);
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
