// Per tensor: counts of NaN, Inf, zeros; min, max, absmax, mean and second moment of the finite
// values; outliers, |x - mean| > 6 sigma with sigma^2 = second moment - mean^2.
//
// One sweep gives everything but the outliers, per chunk of fixed length. The moments follow, and a
// second sweep reads only those chunks whose own extremes lie beyond the limit: the device decides,
// the host never waits.
#include <map>

#include "core/check.h"
#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 512;
constexpr int kInFlight = 4;  // packs a thread has loaded before it uses the first
constexpr std::int64_t kChunk = 65536;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

struct Part {
  double sum, squares;
  float lowest, highest;
  std::int32_t nan, inf, zeros, outliers;
};

struct Limit {
  float mean, distance;
};

struct Record {
  const void* x;  // (numel,) T
  std::int64_t numel;
  Part* parts;  // one per chunk
  Limit* limit;
  double* out;  // (kScanFields,)
};

// What a thread has seen of a chunk, as long as every value is finite.
struct Sums {
  float sum = 0, squares = 0;
  float lowest = INFINITY, highest = -INFINITY;
  float zeros = 0;  // exact, and a cheaper addition than an integer one under a predicate

  __device__ __forceinline__ void add(float x) {
    sum += x;
    squares += x * x;
    lowest = fminf(lowest, x);
    highest = fmaxf(highest, x);
    zeros += x == 0.0f ? 1.0f : 0.0f;
  }

  // One sum vouches for all values: NaN and Inf would have stayed in it, and fp32 squares have
  // neither overflowed nor got lost below the smallest normal number.
  __device__ __forceinline__ bool trustworthy() const {
    const bool only_zeros = lowest >= 0.0f && highest <= 0.0f && squares == 0.0f;
    return only_zeros || (squares > 1e-20f && squares < 1e37f);
  }
};

// The same with nothing assumed, value by value and in fp64.
struct ExactSums {
  double sum = 0, squares = 0;
  float lowest = INFINITY, highest = -INFINITY;
  std::int32_t nan = 0, inf = 0, zeros = 0;

  __device__ __forceinline__ void add(float x) {
    nan += x != x;
    inf += fabsf(x) == INFINITY;
    zeros += x == 0.0f;
    if (!(fabsf(x) < INFINITY)) return;
    sum += x;
    squares += static_cast<double>(x) * x;
    lowest = fminf(lowest, x);
    highest = fmaxf(highest, x);
  }
};

template <class T, bool kAligned>
__device__ __forceinline__ void scan_chunk(const T* x, int n, Part* part) {
  constexpr int kN = kVector<T>;
  const Stripes<kThreads, kN, kAligned> stripes(n);
  Sums fast;
  int stripe = 0;
  for (; stripe + kInFlight <= stripes.whole(); stripe += kInFlight) {
    Pack<T, kN> packs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) packs[i] = stripes.load(x, stripe + i);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int k = 0; k < kN; ++k) fast.add(packs[i][k]);
    }
  }
  stripes.for_each_from(stripe, [&](int i) { fast.add(to_float(x[i])); });

  ExactSums exact{fast.sum,
                  fast.squares,
                  fast.lowest,
                  fast.highest,
                  0,
                  0,
                  static_cast<std::int32_t>(fast.zeros)};
  if (!fast.trustworthy()) {
    exact = ExactSums{};
    stripes.for_each_from(0, [&](int i) { exact.add(to_float(x[i])); });
  }
  Part all;
  all.sum = block_reduce<kThreads>(exact.sum, Sum{});
  all.squares = block_reduce<kThreads>(exact.squares, Sum{});
  all.lowest = block_reduce<kThreads>(exact.lowest, Min{});
  all.highest = block_reduce<kThreads>(exact.highest, Max{});
  all.nan = block_reduce<kThreads>(exact.nan, Sum{});
  all.inf = block_reduce<kThreads>(exact.inf, Sum{});
  all.zeros = block_reduce<kThreads>(exact.zeros, Sum{});
  all.outliers = 0;
  if (threadIdx.x == 0) *part = all;
}

// A chunk of a record: its elements, how many, and its part.
template <class T>
struct Chunk {
  const T* x;
  int n;
  Part* part;

  __device__ __forceinline__ Chunk(const Record& r, int number)
      : x(static_cast<const T*>(r.x) + number * kChunk),
        n(static_cast<int>(min(kChunk, r.numel - number * kChunk))),
        part(r.parts + number) {}
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    scan_sweep(const __grid_constant__ Table<Record> table) {
  const Place place = find_place(table, static_cast<int>(blockIdx.x));
  const Chunk<T> chunk(table.records[place.record], place.block);
  if (aligned(chunk.x, 16)) {
    scan_chunk<T, true>(chunk.x, chunk.n, chunk.part);
  } else {
    scan_chunk<T, false>(chunk.x, chunk.n, chunk.part);
  }
}

// One block per tensor: its chunks in a fixed tree.
__global__ void __launch_bounds__(kFinishThreads)
    scan_moments(const __grid_constant__ Table<Record> table) {
  const Record r = table.records[blockIdx.x];
  const int chunks = static_cast<int>((r.numel + kChunk - 1) / kChunk);
  double sum = 0, squares = 0, nan = 0, inf = 0, zeros = 0;
  float lowest = INFINITY, highest = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kFinishThreads) {
    const Part& part = r.parts[i];
    sum += part.sum;
    squares += part.squares;
    nan += part.nan;
    inf += part.inf;
    zeros += part.zeros;
    lowest = fminf(lowest, part.lowest);
    highest = fmaxf(highest, part.highest);
  }
  sum = block_reduce<kFinishThreads>(sum, Sum{});
  squares = block_reduce<kFinishThreads>(squares, Sum{});
  nan = block_reduce<kFinishThreads>(nan, Sum{});
  inf = block_reduce<kFinishThreads>(inf, Sum{});
  zeros = block_reduce<kFinishThreads>(zeros, Sum{});
  lowest = block_reduce<kFinishThreads>(lowest, Min{});
  highest = block_reduce<kFinishThreads>(highest, Max{});
  if (threadIdx.x != 0) return;

  r.out[kScanNan] = nan;
  r.out[kScanInf] = inf;
  r.out[kScanZeros] = zeros;
  r.out[kScanMin] = lowest;
  r.out[kScanMax] = highest;
  r.out[kScanNumel] = static_cast<double>(r.numel);
  finish_scan_row(sum, squares, r.out);
  r.limit->mean = static_cast<float>(r.out[kScanMean]);
  r.limit->distance = static_cast<float>(outlier_limit(r.out));
}

__device__ __forceinline__ bool is_outlier(float x, const Limit& limit) {
  const float distance = fabsf(x - limit.mean);
  return distance > limit.distance && distance < INFINITY;
}

template <class T, bool kAligned>
__device__ __forceinline__ int count_outliers(const T* x, int n, const Limit& limit) {
  constexpr int kN = kVector<T>;
  const Stripes<kThreads, kN, kAligned> stripes(n);
  int count = 0;
  int stripe = 0;
  for (; stripe + kInFlight <= stripes.whole(); stripe += kInFlight) {
    Pack<T, kN> packs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) packs[i] = stripes.load(x, stripe + i);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int k = 0; k < kN; ++k) count += is_outlier(packs[i][k], limit);
    }
  }
  stripes.for_each_from(stripe, [&](int i) { count += is_outlier(to_float(x[i]), limit); });
  return count;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scan_outliers(const __grid_constant__ Table<Record> table) {
  const Place place = find_place(table, static_cast<int>(blockIdx.x));
  const Record r = table.records[place.record];
  const Chunk<T> chunk(r, place.block);
  const Limit limit = *r.limit;
  // Rounding is monotonic: without an extreme beyond the limit there is no other value beyond it.
  if (!is_outlier(chunk.part->lowest, limit) && !is_outlier(chunk.part->highest, limit)) return;
  const int count = aligned(chunk.x, 16) ? count_outliers<T, true>(chunk.x, chunk.n, limit)
                                         : count_outliers<T, false>(chunk.x, chunk.n, limit);
  const int all = block_reduce<kThreads>(count, Sum{});
  if (threadIdx.x == 0) chunk.part->outliers = all;
}

__global__ void __launch_bounds__(kFinishThreads)
    scan_finish(const __grid_constant__ Table<Record> table) {
  const Record r = table.records[blockIdx.x];
  const int chunks = static_cast<int>((r.numel + kChunk - 1) / kChunk);
  double outliers = 0;
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kFinishThreads)
    outliers += r.parts[i].outliers;
  outliers = block_reduce<kFinishThreads>(outliers, Sum{});
  if (threadIdx.x == 0) r.out[kScanOutliers] = outliers;
}

std::int64_t parts_bytes(const std::vector<Tensor>& tensors) {
  std::int64_t chunks = 0;
  for (const Tensor& t : tensors) chunks += ceil_div(t.numel(), kChunk);
  return aligned_bytes(chunks * std::int64_t{sizeof(Part)});
}

using Kernel = void (*)(Table<Record>);

void for_each_chunk(Kernel kernel, const std::vector<Record>& records, cudaStream_t stream) {
  TableBuilder<Record> tables([&](const Table<Record>& table, std::int64_t blocks) {
    launch("scan", kernel, blocks, kThreads, stream, table);
  });
  for (const Record& r : records) tables.add(r, ceil_div(r.numel, kChunk));
  tables.finish();
}

void for_each_tensor(Kernel kernel, const std::vector<Record>& records, cudaStream_t stream) {
  TableBuilder<Record> tables([&](const Table<Record>& table, std::int64_t blocks) {
    launch("scan", kernel, blocks, kFinishThreads, stream, table);
  });
  for (const Record& r : records) tables.add(r, 1);
  tables.finish();
}

}  // namespace

std::int64_t scan_workspace(const std::vector<Tensor>& tensors) {
  return parts_bytes(tensors) + static_cast<std::int64_t>(tensors.size() * sizeof(Limit));
}

void scan(const ScanParams& p, void* stream_) {
  check(p);
  require(p.workspace.numel() >= scan_workspace(p.tensors), "scan: workspace is too small");
  const auto stream = static_cast<cudaStream_t>(stream_);
  const DeviceGuard guard(p.out.device);
  auto* parts = p.workspace.as<Part>();
  auto* limits = reinterpret_cast<Limit*>(p.workspace.as<char>() + parts_bytes(p.tensors));

  std::vector<Record> all;
  std::map<DType, std::vector<Record>> by_dtype;
  for (const Tensor& t : p.tensors) {
    const auto number = static_cast<std::int64_t>(all.size());
    const Record r{t.data, t.numel(), parts, limits + number,
                   p.out.as<double>() + number * kScanFields};
    all.push_back(r);
    by_dtype[t.dtype].push_back(r);
    parts += ceil_div(t.numel(), kChunk);
  }
  for (const auto& [dtype, records] : by_dtype)
    dispatch_float(dtype, [&, &records = records](auto type) {
      for_each_chunk(scan_sweep<typename decltype(type)::type>, records, stream);
    });
  for_each_tensor(scan_moments, all, stream);
  for (const auto& [dtype, records] : by_dtype)
    dispatch_float(dtype, [&, &records = records](auto type) {
      for_each_chunk(scan_outliers<typename decltype(type)::type>, records, stream);
    });
  for_each_tensor(scan_finish, all, stream);
}

}  // namespace fastprune::cuda
