// rows[i] = sum_j t(w_ij, g_ij, h_ij)   cols[j] = sum_i t(w_ij, g_ij, h_ij)
//
// t is score_term in core/math.h. One pass over the matrix gives both: a block walks down a tile
// of 128 rows, each thread keeps the sums of its own columns in registers, and each warp adds up
// its part of a row with shuffles. Partial sums go to the workspace, and a second kernel adds
// them in a fixed order. Tiles depend on the dtype and on whether rows are aligned to 16 bytes,
// not on the card, and nor do results.
#include <type_traits>

#include "core/check.h"
#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kWarpsAcross = 4;  // warps side by side over the columns of a tile
constexpr int kWarpsDown = 2;    // halves of a tile's rows
constexpr int kThreads = kWarp * kWarpsAcross * kWarpsDown;
constexpr int kTileRows = 128;
constexpr int kRowsInFlight = 4;  // rows a thread has loaded before it uses the first

// Columns of a thread: 16 bytes of a row where all rows are aligned to that, else 4 single ones.
template <class T, bool kAligned>
constexpr int kVector = kAligned ? 16 / static_cast<int>(sizeof(T)) : 4;
template <class T, bool kAligned>
constexpr int kTileColumns = kWarp * kWarpsAcross * kVector<T, kAligned>;
constexpr int kNarrowestTile = kTileColumns<float, true>;

struct Absent {};  // no h given

struct Arguments {
  const void* w;       // (out, in) T, rows w_stride apart
  const void* g;       // (out, in) T, rows g_stride apart, or null
  const void* h;       // (out, in) H, rows h_stride apart, or null
  const float* x;      // (in,), or null
  float* row_sums;     // (tiles, out)
  float* column_sums;  // (chunks of kTileRows rows, in)
  std::int64_t out, in;
  std::int64_t w_stride, g_stride, h_stride;
  int tiles;  // over the columns
};

// Where a thread's columns lie: side by side when all rows are aligned, else one in every kWarp,
// so that a warp's loads of single elements are still consecutive.
template <class T, bool kAligned>
struct Columns {
  static constexpr int kN = kVector<T, kAligned>;
  static constexpr int kStep = kAligned ? 1 : kWarp;

  std::int64_t first;
  std::int64_t in;

  __device__ __forceinline__ Columns(int tile, int warp_across, int lane, std::int64_t in_)
      : first(std::int64_t{tile} * kTileColumns<T, kAligned> + warp_across * (kWarp * kN) +
              lane * (kAligned ? kN : 1)),
        in(in_) {}

  __device__ __forceinline__ bool inside(int k) const { return first + k * kStep < in; }

  // row: (in,) U. Columns outside read as zero.
  template <class U>
  __device__ __forceinline__ Pack<U, kN> load(const U* row) const {
    Pack<U, kN> values;
    if constexpr (kAligned) {
      values.load(row + first);
    } else {
#pragma unroll
      for (int k = 0; k < kN; ++k)
        values.elements[k] = inside(k) ? load_one(row + first + k * kStep) : U{};
    }
    return values;
  }

  // row: (in,) floats
  __device__ __forceinline__ void store(const float (&values)[kN], float* row) const {
    if constexpr (kAligned) {
      if (!inside(0)) return;
      Pack<float, kN> pack;
#pragma unroll
      for (int k = 0; k < kN; ++k) pack.elements[k] = values[k];
      pack.store(row + first);
    } else {
#pragma unroll
      for (int k = 0; k < kN; ++k)
        if (inside(k)) row[first + k * kStep] = values[k];
    }
  }
};

template <Score S, class T, class H, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) taylor_tile(const Arguments p) {
  constexpr bool kFisher = !std::is_same_v<H, Absent>;
  constexpr bool kGradient = S == Score::first || S == Score::mix || S == Score::vector ||
                             (S == Score::second && !kFisher);
  constexpr int kN = kVector<T, kAligned>;
  using Fisher = std::conditional_t<kFisher, H, T>;

  __shared__ float of_warp[kTileRows][kWarpsAcross];
  __shared__ float of_lower_half[kWarp * kWarpsAcross * kN];

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_across = static_cast<int>(threadIdx.x) / kWarp % kWarpsAcross;
  const int warp_down = static_cast<int>(threadIdx.x) / (kWarp * kWarpsAcross);
  const int tile = static_cast<int>(blockIdx.x) % p.tiles;
  const int chunk = static_cast<int>(blockIdx.x) / p.tiles;
  const Columns<T, kAligned> columns(tile, warp_across, lane, p.in);
  const bool active = columns.inside(0);

  const std::int64_t first_row = std::int64_t{chunk} * kTileRows;
  const int rows = static_cast<int>(min(std::int64_t{kTileRows}, p.out - first_row));
  const int begin = warp_down * (kTileRows / kWarpsDown);
  const int end = min(rows, begin + kTileRows / kWarpsDown);

  float column_sum[kN] = {};
  float x[kN] = {};
  if constexpr (S == Score::activation) {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      if (columns.inside(k)) x[k] = p.x[columns.first + k * columns.kStep];
  }

  for (int row = begin; row < end; row += kRowsInFlight) {
    Pack<T, kN> w[kRowsInFlight];
    Pack<T, kN> g[kRowsInFlight];
    Pack<Fisher, kN> h[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (!active || row + r >= end) continue;
      const std::int64_t i = first_row + row + r;
      w[r] = columns.load(static_cast<const T*>(p.w) + i * p.w_stride);
      if constexpr (kGradient) g[r] = columns.load(static_cast<const T*>(p.g) + i * p.g_stride);
      if constexpr (kFisher) h[r] = columns.load(static_cast<const H*>(p.h) + i * p.h_stride);
    }
    float row_sum[kRowsInFlight] = {};
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (!active || row + r >= end) continue;
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const float gradient = kGradient ? g[r][k] : 0.0f;
        float fisher = gradient * gradient;
        if constexpr (kFisher) fisher = h[r][k];
        if constexpr (S == Score::activation) fisher = x[k];
        const float term = score_term<S>(w[r][k], gradient, fisher);
        row_sum[r] += term;
        column_sum[k] += term;
      }
    }
    const float sum = warp_sum_of_four(row_sum);
    if (lane % 8 == 0) of_warp[row + lane / 8][warp_across] = sum;
  }

  if (warp_down == 1) {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      of_lower_half[(warp_across * kN + k) * kWarp + lane] = column_sum[k];
  }
  __syncthreads();
  if (warp_down == 0) {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      column_sum[k] += of_lower_half[(warp_across * kN + k) * kWarp + lane];
    columns.store(column_sum, p.column_sums + chunk * p.in);
  }
  if (static_cast<int>(threadIdx.x) < rows) {
    float sum = of_warp[threadIdx.x][0];
#pragma unroll
    for (int warp = 1; warp < kWarpsAcross; ++warp) sum += of_warp[threadIdx.x][warp];
    p.row_sums[tile * p.out + first_row + threadIdx.x] = sum;
  }
}

// total[i] = sum_k parts[k][i], for the rows in the first row_blocks blocks, then the columns.
struct Combination {
  const float* parts;  // (count, length)
  float* total;        // (length,)
  std::int64_t count, length;
};

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kWarp * kCombineWarps;

__global__ void __launch_bounds__(kCombineThreads)
    taylor_combine(const Combination rows, const Combination columns, std::int64_t row_blocks) {
  __shared__ float of_warp[kCombineWarps][kWarp];
  const bool of_rows = blockIdx.x < row_blocks;
  const Combination c = of_rows ? rows : columns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t i = (blockIdx.x - (of_rows ? 0 : row_blocks)) * kWarp + lane;

  float sum = 0.0f;
  if (i < c.length) {
#pragma unroll 8
    for (std::int64_t k = warp; k < c.count; k += kCombineWarps) sum += c.parts[k * c.length + i];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && i < c.length) {
#pragma unroll
    for (int other = 1; other < kCombineWarps; ++other) sum += of_warp[other][lane];
    c.total[i] = sum;
  }
}

// Enough for the narrowest tile, so for every dtype.
std::int64_t row_sum_bytes(std::int64_t out, std::int64_t in) {
  return aligned_bytes(ceil_div(in, kNarrowestTile) * out * std::int64_t{sizeof(float)});
}

bool rows_aligned(const Tensor& t) {
  return !t.present() || (aligned(t.data, 16) && t.row_stride() * item_size(t.dtype) % 16 == 0);
}

template <Score S, class T, class H, bool kAligned>
void enqueue(const TaylorParams& p, cudaStream_t stream) {
  Arguments a{};
  a.w = p.w.data;
  a.g = p.g.data;
  a.h = p.h.data;
  a.x = p.x.as<const float>();
  a.out = p.w.rows();
  a.in = p.w.cols();
  a.w_stride = p.w.row_stride();
  a.g_stride = p.g.present() ? p.g.row_stride() : 0;
  a.h_stride = p.h.present() ? p.h.row_stride() : 0;
  a.tiles = static_cast<int>(ceil_div(a.in, kTileColumns<T, kAligned>));
  const std::int64_t chunks = ceil_div(a.out, kTileRows);
  a.row_sums = p.workspace.as<float>();
  a.column_sums = a.row_sums + row_sum_bytes(a.out, a.in) / std::int64_t{sizeof(float)};

  launch("taylor", taylor_tile<S, T, H, kAligned>, a.tiles * chunks, kThreads, stream, a);

  const Combination rows{a.row_sums, p.rows.as<float>(), a.tiles, a.out};
  const Combination columns{a.column_sums, p.cols.as<float>(), chunks, a.in};
  const std::int64_t row_blocks = ceil_div(a.out, kWarp);
  launch("taylor", taylor_combine, row_blocks + ceil_div(a.in, kWarp), kCombineThreads, stream,
         rows, columns, row_blocks);
}

template <Score S, class T, class H>
void run(const TaylorParams& p, cudaStream_t stream) {
  if (p.w.cols() % kVector<T, true> == 0 && rows_aligned(p.w) && rows_aligned(p.g) &&
      rows_aligned(p.h))
    return enqueue<S, T, H, true>(p, stream);
  enqueue<S, T, H, false>(p, stream);
}

// The scores that take h, with the three forms it has: absent, w's dtype, fp32.
template <Score S, class T>
void run_with_fisher(const TaylorParams& p, cudaStream_t stream) {
  if (!p.h.present()) return run<S, T, Absent>(p, stream);
  if (p.h.dtype == DType::f32) return run<S, T, float>(p, stream);
  return run<S, T, T>(p, stream);
}

template <class T>
void run_score(const TaylorParams& p, cudaStream_t stream) {
  switch (p.score) {
    case Score::first:
      return run<Score::first, T, Absent>(p, stream);
    case Score::second:
      return run_with_fisher<Score::second, T>(p, stream);
    case Score::mix:
      return run_with_fisher<Score::mix, T>(p, stream);
    case Score::vector:
      return run<Score::vector, T, Absent>(p, stream);
    case Score::l1:
      return run<Score::l1, T, Absent>(p, stream);
    case Score::l2:
      return run<Score::l2, T, Absent>(p, stream);
    case Score::activation:
      return run<Score::activation, T, Absent>(p, stream);
  }
}

}  // namespace

std::int64_t taylor_workspace(std::int64_t out, std::int64_t in) {
  return row_sum_bytes(out, in) +
         aligned_bytes(ceil_div(out, kTileRows) * in * std::int64_t{sizeof(float)});
}

void taylor(const TaylorParams& p, void* stream) {
  check(p);
  require(p.workspace.numel() >= taylor_workspace(p.w.rows(), p.w.cols()),
          "taylor: workspace is too small");
  const DeviceGuard guard(p.w.device);
  dispatch_float(p.w.dtype, [&](auto type) {
    run_score<typename decltype(type)::type>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastprune::cuda
