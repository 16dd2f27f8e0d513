// Loads and stores of several consecutive elements in accesses of up to 16 bytes. Every op reads
// and writes each byte once, so all of them are marked to leave the cache first.
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
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const word*>(p) + i);
  }

  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<word*>(p) + i, words[i]);
  }

  __device__ __forceinline__ float operator[](int i) const { return to_float(elements[i]); }
};

template <class T>
__device__ __forceinline__ T load_one(const T* p) {
  Pack<T, 1> one;
  one.load(p);
  return one.elements[0];
}

inline bool aligned(const void* p, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

}  // namespace fastprune::cuda
