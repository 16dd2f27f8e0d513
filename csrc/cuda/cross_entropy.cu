// loss = log(sum of exp(x)) - x[target] for a row x of logits; in place, x = scale * (softmax(x) -
// onehot(target)).
//
// One block per row, one pass: each thread keeps the largest value it has seen and the sum of
// exponentials relative to it, and the block combines those pairs in a fixed tree. The gradient is
// a second pass over the row. Nothing is decided on the host, which never waits.
#include <limits>

#include "core/check.h"
#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;  // packs a thread has loaded before it uses the first

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

struct Arguments {
  void* logits;                 // (rows, vocabulary) T
  const std::int64_t* targets;  // (rows,)
  float* loss;                  // (rows,)
  float* log_normaliser;        // (rows,)
  std::int64_t row_stride;      // elements
  int vocabulary;
  bool in_place;
  float scale;
};

// What exponents are taken relative to: without it, infinities would meet.
__device__ __forceinline__ float shift_of(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}

// Sum of exp(x - shift_of(highest)) over the values seen so far.
struct ExpSum {
  float highest = -INFINITY, sum = 0;

  __device__ __forceinline__ void rise_to(float value) {
    if (!(value > highest)) return;
    sum *= expf(highest - value);
    highest = value;
  }

  // __expf errs by |x| 2^-24 relative to exp(x), thus by less than 2^-25 of the sum's largest term.
  __device__ __forceinline__ void add(float x) { sum += __expf(x - shift_of(highest)); }
};

// kPacks consecutive stripes, all loaded before the first is used.
template <int kPacks, class T, class Stripes>
__device__ __forceinline__ void add_stripes(const Stripes& stripes, const T* x, int stripe,
                                            ExpSum& own) {
  constexpr int kN = kVector<T>;
  Pack<T, kN> packs[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) packs[i] = stripes.load(x, stripe + i);
  float top = -INFINITY;  // fmaxf passes over NaN, which stays in the sum
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kN; ++k) top = fmaxf(top, packs[i][k]);
  }
  own.rise_to(top);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kN; ++k) own.add(packs[i][k]);
  }
}

// The sum over a row, the same in all threads.
template <class T, bool kAligned>
__device__ __forceinline__ ExpSum exp_sum(const T* x, int n) {
  const Stripes<kThreads, kVector<T>, kAligned> stripes(n);
  ExpSum own;
  int stripe = 0;
  for (; stripe + kInFlight <= stripes.whole(); stripe += kInFlight)
    add_stripes<kInFlight>(stripes, x, stripe, own);
  for (; stripe < stripes.whole(); ++stripe) add_stripes<1>(stripes, x, stripe, own);
  stripes.for_each_from(stripe, [&](int i) {
    const float value = to_float(x[i]);
    own.rise_to(value);
    own.add(value);
  });

  __shared__ float highest_of_row, sum_of_row;
  const float highest = block_reduce<kThreads>(own.highest, Max{});
  if (threadIdx.x == 0) highest_of_row = highest;
  __syncthreads();
  own.sum *= expf(own.highest - shift_of(highest_of_row));
  const float sum = block_reduce<kThreads>(own.sum, Sum{});
  if (threadIdx.x == 0) sum_of_row = sum;
  __syncthreads();
  return {highest_of_row, sum_of_row};
}

template <int kPacks, class T, class Stripes, class Rule>
__device__ __forceinline__ void overwrite_stripes(const Stripes& stripes, T* x, int stripe,
                                                  Rule rule) {
  constexpr int kN = kVector<T>;
  Pack<T, kN> packs[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) packs[i] = stripes.load(x, stripe + i);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kN; ++k) round_to(rule(packs[i][k]), packs[i].elements[k]);
    stripes.store(packs[i], x, stripe + i);
  }
}

// Each value of a row by rule(value), in place.
template <class T, bool kAligned, class Rule>
__device__ __forceinline__ void overwrite(T* x, int n, Rule rule) {
  const Stripes<kThreads, kVector<T>, kAligned> stripes(n);
  int stripe = 0;
  for (; stripe + kInFlight <= stripes.whole(); stripe += kInFlight)
    overwrite_stripes<kInFlight>(stripes, x, stripe, rule);
  for (; stripe < stripes.whole(); ++stripe) overwrite_stripes<1>(stripes, x, stripe, rule);
  stripes.for_each_from(stripe, [&](int i) { round_to(rule(to_float(x[i])), x[i]); });
}

template <class T, bool kAligned>
__device__ __forceinline__ void cross_entropy_row(T* x, const Arguments& a) {
  const int n = a.vocabulary;
  const std::int64_t target = a.targets[blockIdx.x];
  const bool ignored = target == kIgnored;
  const bool known = target >= 0 && target < n;
  const float logit = known ? to_float(x[target]) : NAN;
  const ExpSum row = exp_sum<T, kAligned>(x, n);
  const float shift = shift_of(row.highest);
  if (threadIdx.x == 0) {
    const float log_sum = logf(row.sum);
    a.log_normaliser[blockIdx.x] = shift + log_sum;
    // Not from the rounded normaliser: it may be far larger than the loss.
    a.loss[blockIdx.x] = ignored ? 0.0f : (shift - logit) + log_sum;
  }
  if (!a.in_place) return;

  const float factor = known ? a.scale / row.sum : NAN;
  const auto softmax = [&](float value) { return ignored ? 0.0f : expf(value - shift) * factor; };
  overwrite<T, kAligned>(x, n, softmax);
  __syncthreads();  // another thread may have written the target's element
  if (threadIdx.x == 0 && known) round_to(softmax(logit) - a.scale, x[target]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_rows(const Arguments a) {
  T* x = static_cast<T*>(a.logits) + blockIdx.x * a.row_stride;
  if (aligned(x, 16)) {
    cross_entropy_row<T, true>(x, a);
  } else {
    cross_entropy_row<T, false>(x, a);
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, void* stream) {
  check(p);
  require(p.logits.cols() <= std::numeric_limits<int>::max() - kThreads * 16,
          "cross_entropy: a vocabulary of ", p.logits.cols(), " is too large");
  const DeviceGuard guard(p.logits.device);
  const Arguments arguments{p.logits.data,         p.targets.as<std::int64_t>(),
                            p.loss.as<float>(),    p.log_normaliser.as<float>(),
                            p.logits.row_stride(), static_cast<int>(p.logits.cols()),
                            p.scale.has_value(),   p.scale.value_or(1)};
  dispatch_float(p.logits.dtype, [&](auto type) {
    launch("cross_entropy", cross_entropy_rows<typename decltype(type)::type>, p.logits.rows(),
           kThreads, static_cast<cudaStream_t>(stream), arguments);
  });
}

}  // namespace fastprune::cuda
