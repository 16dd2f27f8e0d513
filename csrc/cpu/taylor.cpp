// Tiles of fixed size: each gives the sums of its rows and of its columns, and fixed trees combine
// them. Which thread computes a tile does not matter to the result.
#include "core/check.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {

constexpr std::int64_t kTileRows = 32;
constexpr std::int64_t kTileCols = 16 * 1024;  // column sums stay in the second-level cache
constexpr std::int64_t kSumCols = 1024;        // columns of one task of the combination

std::int64_t tiles(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// A half-precision or float matrix at (r, c); absent stays absent.
const void* at(const Tensor& t, std::int64_t r, std::int64_t c) {
  if (!t.present()) return nullptr;
  return t.as<const char>() + (r * t.row_stride() + c) * item_size(t.dtype);
}

}  // namespace

std::int64_t taylor_workspace(std::int64_t out, std::int64_t in) {
  return std::int64_t(sizeof(float)) * (tiles(out, kTileRows) * in + tiles(in, kTileCols) * out);
}

void taylor(const TaylorParams& p) {
  check(p);
  const std::int64_t out = p.w.rows(), in = p.w.cols();
  float* rows = p.rows.as<float>();
  float* cols = p.cols.as<float>();
  if (out == 0 || in == 0) {
    for (std::int64_t r = 0; r < out; ++r) rows[r] = 0;
    for (std::int64_t c = 0; c < in; ++c) cols[c] = 0;
    return;
  }
  require(p.workspace.numel() >= taylor_workspace(out, in), "taylor: workspace is too small");
  const std::int64_t down = tiles(out, kTileRows), across = tiles(in, kTileCols);
  float* col_partials = p.workspace.as<float>();   // (down, in)
  float* row_partials = col_partials + down * in;  // (across, out)
  const Level& loops = level();

  for_each_task(down * across, out * in * item_size(p.w.dtype), [&](std::int64_t task) {
    const std::int64_t i = task / across, j = task % across;
    const std::int64_t r = i * kTileRows, c = j * kTileCols;
    TaylorTile tile{};
    tile.score = p.score;
    tile.dtype = p.w.dtype;
    tile.h_dtype = p.h.dtype;
    tile.w = at(p.w, r, c);
    tile.g = at(p.g, r, c);
    tile.h = at(p.h, r, c);
    tile.w_stride = p.w.row_stride();
    tile.g_stride = p.g.present() ? p.g.row_stride() : 0;
    tile.h_stride = p.h.present() ? p.h.row_stride() : 0;
    tile.x = p.x.present() ? p.x.as<float>() + c : nullptr;
    tile.rows = out - r < kTileRows ? out - r : kTileRows;
    tile.cols = in - c < kTileCols ? in - c : kTileCols;
    tile.row_sums = (across == 1 ? rows : row_partials + j * out) + r;
    tile.col_sums = (down == 1 ? cols : col_partials + i * in) + c;
    loops.taylor_tile(tile);
  });

  if (down > 1)
    for_each_task(tiles(in, kSumCols), down * in * std::int64_t(sizeof(float)),
                  [&](std::int64_t task) {
                    const std::int64_t c = task * kSumCols;
                    const std::int64_t n = in - c < kSumCols ? in - c : kSumCols;
                    loops.sum_rows(col_partials + c, down, in, n, cols + c);
                  });
  if (across > 1) loops.sum_rows(row_partials, across, out, out, rows);
}

}  // namespace fastprune::cpu
