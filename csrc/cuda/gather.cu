// dst[i, j] = src[index[i], j]  (dim 0)        dst[i, j] = src[i, index[j]]  (dim 1)
//
// Whatever the dtype, bytes are copied in units of the largest size, up to 16 bytes, to which the
// rows, the pointers and the runs of the index are aligned: whole heads of o_proj go in 16-byte
// units, single bf16 channels of down_proj in units of 2. All tensors of a call that have the same
// unit share a launch.
#include <array>
#include <map>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kRowsInFlight = 4;
constexpr int kColumnsInFlight = 4;
constexpr int kRowsOfWarp = 16;
constexpr int kTileRows = kWarps * kRowsOfWarp;
constexpr int kTileColumns = kWarp * kColumnsInFlight;

// Lengths and positions along a row are in units.
struct Matrix {
  const void* src;                // rows src_stride units apart
  void* dst;                      // (rows, columns) units
  const std::int32_t* row_index;  // (rows,), or null for all rows in order
  const std::int32_t* col_index;  // (columns,), or null for all columns in order
  std::int64_t src_stride;
  std::int32_t rows, columns;
};

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_tiles(const __grid_constant__ Table<Matrix> table) {
  const Place place = find_place(table, static_cast<int>(blockIdx.x));
  const Matrix m = table.records[place.record];
  const int tiles_across = (m.columns + kTileColumns - 1) / kTileColumns;
  const int first_row = place.block / tiles_across * kTileRows;
  const int first_column = place.block % tiles_across * kTileColumns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;

  // Where the tile's rows and columns come from is read once: lane l keeps the source of the
  // warp's l-th row, and every lane those of its own columns.
  const int own_row = first_row + warp + lane * kWarps;
  int from_row = own_row;
  if (m.row_index && lane < kRowsOfWarp && own_row < m.rows) from_row = m.row_index[own_row];
  int from_column[kColumnsInFlight];
  bool inside[kColumnsInFlight];
#pragma unroll
  for (int c = 0; c < kColumnsInFlight; ++c) {
    const int column = first_column + c * kWarp + lane;
    inside[c] = column < m.columns;
    from_column[c] = m.col_index && inside[c] ? m.col_index[column] : column;
  }

  const Unit* src = static_cast<const Unit*>(m.src);
  Unit* dst = static_cast<Unit*>(m.dst) + first_column + lane;
  for (int step = 0; step < kRowsOfWarp; step += kRowsInFlight) {
    Unit values[kRowsInFlight][kColumnsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int i = first_row + warp + (step + r) * kWarps;
      const int from = __shfl_sync(kAllLanes, from_row, step + r);
      const Unit* row = src + from * m.src_stride;
#pragma unroll
      for (int c = 0; c < kColumnsInFlight; ++c)
        if (inside[c] && i < m.rows) values[r][c] = row[from_column[c]];
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int i = first_row + warp + (step + r) * kWarps;
      Unit* row = dst + std::int64_t{i} * m.columns;
#pragma unroll
      for (int c = 0; c < kColumnsInFlight; ++c)
        if (inside[c] && i < m.rows) row[c * kWarp] = values[r][c];
    }
  }
}

// ---------------------------------------------------------------------------- plan of the copies
constexpr std::array<int, 5> kUnits = {16, 8, 4, 2, 1};

// An item as a matrix in bytes: one row where the index runs along the only dimension.
struct Copy {
  const GatherItem& item;
  std::int64_t size;        // bytes of an element
  std::int64_t rows;        // of dst
  std::int64_t src_stride;  // bytes from row to row
  std::int64_t dst_stride;  // bytes of a row of dst
  bool along_row;           // the index picks columns

  explicit Copy(const GatherItem& it)
      : item(it),
        size(item_size(it.src.dtype)),
        rows(it.dst.ndim == 2 ? it.dst.shape[0] : 1),
        src_stride(it.src.ndim == 2 ? it.src.row_stride() * size : 0),
        dst_stride((it.dst.ndim == 2 ? it.dst.cols() : it.dst.numel()) * size),
        along_row(it.dim == 1 || it.src.ndim == 1) {}

  bool empty() const { return rows == 0 || dst_stride == 0; }
};

// The index consists of runs of `length` consecutive positions that begin at its multiples.
bool consists_of_runs(const std::int64_t* index, std::int64_t count, std::int64_t length) {
  if (count % length != 0) return false;
  for (std::int64_t i = 0; i < count; ++i)
    if (i % length == 0 ? index[i] % length != 0 : index[i] != index[i - 1] + 1) return false;
  return true;
}

int unit_of(const Copy& c) {
  for (const int unit : kUnits) {
    if (unit <= c.size) return static_cast<int>(c.size);
    const bool fits = aligned(c.item.src.data, unit) && aligned(c.item.dst.data, unit) &&
                      c.dst_stride % unit == 0 && (c.rows == 1 || c.src_stride % unit == 0);
    if (fits && (!c.along_row || consists_of_runs(c.item.index.as<const std::int64_t>(),
                                                  c.item.index.numel(), unit / c.size)))
      return unit;
  }
  return 1;
}

// Indices in units for the device; tensors cut by the same index in the same unit share one copy.
class Indices {
 public:
  std::int64_t add(const Tensor& index, std::int64_t run) {
    const auto key = std::tuple{index.data, index.numel(), run};
    const auto known = begin_.find(key);
    if (known != begin_.end()) return known->second;
    const auto begin = static_cast<std::int64_t>(values_.size());
    const auto* positions = index.as<const std::int64_t>();
    for (std::int64_t i = 0; i < index.numel(); i += run)
      values_.push_back(static_cast<std::int32_t>(positions[i] / run));
    begin_.emplace(key, begin);
    return begin;
  }

  const std::vector<std::int32_t>& values() const { return values_; }

 private:
  std::map<std::tuple<void*, std::int64_t, std::int64_t>, std::int64_t> begin_;
  std::vector<std::int32_t> values_;
};

template <class Unit>
void enqueue(const std::vector<Matrix>& matrices, cudaStream_t stream) {
  TableBuilder<Matrix> tables([&](const Table<Matrix>& table, std::int64_t blocks) {
    launch("gather", gather_tiles<Unit>, blocks, kThreads, stream, table);
  });
  for (const Matrix& m : matrices)
    tables.add(m, ceil_div(m.rows, kTileRows) * ceil_div(m.columns, kTileColumns));
  tables.finish();
}

}  // namespace

std::int64_t gather_workspace(const std::vector<GatherItem>& items) {
  std::int64_t entries = 0;
  for (const GatherItem& item : items) entries += item.index.numel();
  return entries * std::int64_t{sizeof(std::int32_t)};
}

void gather(const GatherParams& p, void* stream_) {
  check(p);
  if (p.items.empty()) return;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const DeviceGuard guard(p.items.front().src.device);
  require((p.workspace.present() ? p.workspace.numel() : 0) >= gather_workspace(p.items),
          "gather: workspace is too small");
  const auto* device_index = p.workspace.as<const std::int32_t>();

  Indices indices;
  std::map<int, std::vector<Matrix>> by_unit;
  for (const GatherItem& item : p.items) {
    const Copy c(item);
    if (c.empty()) continue;
    const int unit = unit_of(c);
    const std::int64_t begin = indices.add(item.index, c.along_row ? unit / c.size : 1);
    Matrix m{};
    m.src = item.src.data;
    m.dst = item.dst.data;
    (c.along_row ? m.col_index : m.row_index) = device_index + begin;
    m.src_stride = c.src_stride / unit;
    m.rows = static_cast<std::int32_t>(c.rows);
    m.columns = static_cast<std::int32_t>(c.dst_stride / unit);
    by_unit[unit].push_back(m);
  }

  // From pageable memory: the runtime has taken its copy when the call returns.
  const auto& values = indices.values();
  if (!values.empty())
    succeed(cudaMemcpyAsync(p.workspace.data, values.data(), values.size() * sizeof(values[0]),
                            cudaMemcpyHostToDevice, stream),
            "gather");
  enqueue<Word<16>::type>(by_unit[16], stream);
  enqueue<Word<8>::type>(by_unit[8], stream);
  enqueue<Word<4>::type>(by_unit[4], stream);
  enqueue<Word<2>::type>(by_unit[2], stream);
  enqueue<Word<1>::type>(by_unit[1], stream);
}

}  // namespace fastprune::cuda
