// Sums and extremes over the lanes of a warp and the warps of a block, always in the same tree.
#pragma once

#include "cuda/launch.cuh"

namespace fastprune::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The combination of all lanes' values, in every lane.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Four sums at once: lane l returns the sum over all lanes of values[l / 8]. Lanes trade halves of
// the four first, which takes 6 shuffles where four separate sums take 20.
__device__ __forceinline__ float warp_sum_of_four(const float (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool upper = lane & 16;
  const bool odd = lane & 8;
  const float a = (upper ? values[2] : values[0]) +
                  __shfl_xor_sync(kAllLanes, upper ? values[0] : values[2], 16);
  const float b = (upper ? values[3] : values[1]) +
                  __shfl_xor_sync(kAllLanes, upper ? values[1] : values[3], 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// The combination over a block of kThreads, valid in thread 0. All threads take part.
template <int kThreads, class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T of_warp[kWarps];
  value = warp_reduce(value, combine);
  __syncthreads();  // the array may still be read from the previous call
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, of_warp[warp]);
  }
  return value;
}

}  // namespace fastprune::cuda
