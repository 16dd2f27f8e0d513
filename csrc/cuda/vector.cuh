// Loads and stores of several consecutive elements in accesses of up to 16 bytes. They are cached
// as usual: hints to leave the cache first gained nothing, and cost 20 % where neighbouring threads
// read from the same sector (bench/results).
#pragma once

#include <cstdint>

#include "core/math.h"

namespace fastprune::cuda {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = std::uint8_t;
};
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<4> {
  using type = std::uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// N elements of T as they lie in memory.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static constexpr int kWordBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / kWordBytes;
  using word = typename Word<kWordBytes>::type;

  union {
    word words[kWords];
    T elements[N];
  };

  __device__ __forceinline__ Pack() {}

  // p: N elements, aligned to a word
  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const word*>(p)[i];
  }

  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<word*>(p)[i] = words[i];
  }

  __device__ __forceinline__ float operator[](int i) const { return to_float(elements[i]); }
};

template <class T>
__device__ __forceinline__ T load_one(const T* p) {
  Pack<T, 1> one;
  one.load(p);
  return one.elements[0];
}

template <class T>
__device__ __forceinline__ void store_one(T value, T* p) {
  Pack<T, 1> one;
  one.elements[0] = value;
  one.store(p);
}

// A block of kThreads takes a chunk of n elements in stripes of kThreads * N. In each stripe a
// thread has N elements: side by side where memory is aligned to them, else one in every kThreads,
// so that single accesses of a warp are still consecutive.
template <int kThreads, int N, bool kAligned>
struct Stripes {
  static constexpr int kLength = kThreads * N;
  static constexpr int kStep = kAligned ? 1 : kThreads;

  int first;  // the thread's first element in the first stripe
  int n;

  __device__ __forceinline__ explicit Stripes(int n_)
      : first(static_cast<int>(threadIdx.x) * (kAligned ? N : 1)), n(n_) {}

  __device__ __forceinline__ int whole() const { return n / kLength; }

  // Position in the chunk of the thread's k-th element of a stripe.
  __device__ __forceinline__ int at(int stripe, int k) const {
    return stripe * kLength + first + k * kStep;
  }

  // visit(i) for the thread's elements from a stripe on to the end of the chunk, one by one.
  template <class Visit>
  __device__ __forceinline__ void for_each_from(int stripe, Visit visit) const {
    for (int begin = stripe * kLength + first; begin < n; begin += kLength) {
#pragma unroll 1
      for (int k = 0; k < N && begin + k * kStep < n; ++k) visit(begin + k * kStep);
    }
  }

  // chunk: (n,) T; the stripe is whole
  template <class T>
  __device__ __forceinline__ Pack<T, N> load(const T* chunk, int stripe) const {
    Pack<T, N> values;
    if constexpr (kAligned) {
      values.load(chunk + at(stripe, 0));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) values.elements[k] = load_one(chunk + at(stripe, k));
    }
    return values;
  }

  template <class T>
  __device__ __forceinline__ void store(const Pack<T, N>& values, T* chunk, int stripe) const {
    if constexpr (kAligned) {
      values.store(chunk + at(stripe, 0));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) store_one(values.elements[k], chunk + at(stripe, k));
    }
  }
};

__host__ __device__ inline bool aligned(const void* p, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

}  // namespace fastprune::cuda
