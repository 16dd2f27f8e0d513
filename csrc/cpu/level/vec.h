// Sixteen lanes of float or 32-bit integers, whatever the machine's registers hold, so that every
// instruction-set level performs the same operations in the same order and returns the same bits.
// Included by level.cpp only: it is compiled once per level.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/dispatch.h"

#define LANES_INLINE inline __attribute__((always_inline))

namespace fastprune::cpu {
namespace {  // internal linkage: nothing of one level may be linked into another

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

template <class T>
struct NativeOf {
  typedef T type __attribute__((vector_size(kNative * sizeof(T))));
};
template <class T>
using Native = typename NativeOf<T>::type;

// part[k] holds lanes k * kNative and up.
template <class T>
struct Lanes {
  Native<T> part[kParts];

  Lanes() = default;
  LANES_INLINE Lanes(T x) {
    for (auto& p : part) p = Native<T>{} + x;
  }
};

using F32 = Lanes<float>;
using U32 = Lanes<std::uint32_t>;
using I32 = Lanes<std::int32_t>;  // also masks: 0 or -1 per lane

template <class R, class T, class F>
LANES_INLINE Lanes<R> each(const Lanes<T>& a, F f) {
  Lanes<R> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = f(a.part[k]);
  return r;
}

#define LANES_OPERATOR(op)                                                  \
  template <class T>                                                        \
  LANES_INLINE Lanes<T> operator op(const Lanes<T>& a, const Lanes<T>& b) { \
    Lanes<T> r;                                                             \
    for (int k = 0; k < kParts; ++k) r.part[k] = a.part[k] op b.part[k];    \
    return r;                                                               \
  }
LANES_OPERATOR(+)
LANES_OPERATOR(-)
LANES_OPERATOR(*)
LANES_OPERATOR(/)
LANES_OPERATOR(&)
LANES_OPERATOR(|)
LANES_OPERATOR(^)
#undef LANES_OPERATOR

#define LANES_COMPARISON(op)                                                                   \
  template <class T>                                                                           \
  LANES_INLINE I32 operator op(const Lanes<T>& a, const Lanes<T>& b) {                         \
    I32 r;                                                                                     \
    for (int k = 0; k < kParts; ++k) r.part[k] = Native<std::int32_t>(a.part[k] op b.part[k]); \
    return r;                                                                                  \
  }
LANES_COMPARISON(<)
LANES_COMPARISON(>)
LANES_COMPARISON(==)
LANES_COMPARISON(>=)
#undef LANES_COMPARISON

template <class T>
LANES_INLINE Lanes<T> operator>>(const Lanes<T>& a, int n) {
  return each<T>(a, [n](auto p) { return p >> n; });
}
template <class T>
LANES_INLINE Lanes<T> operator<<(const Lanes<T>& a, int n) {
  return each<T>(a, [n](auto p) { return p << n; });
}

LANES_INLINE U32 bits_of(const F32& x) {
  return each<std::uint32_t>(x, [](auto p) { return Native<std::uint32_t>(p); });
}
LANES_INLINE F32 float_of(const U32& x) {
  return each<float>(x, [](auto p) { return Native<float>(p); });
}
template <class T>
LANES_INLINE Lanes<T> select(const I32& mask, const Lanes<T>& yes, const Lanes<T>& no) {
  Lanes<T> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = mask.part[k] ? yes.part[k] : no.part[k];
  return r;
}
// Defined for values below 2^31, where signed and unsigned agree.
LANES_INLINE I32 as_int(const U32& x) {
  return each<std::int32_t>(x, [](auto p) { return Native<std::int32_t>(p); });
}
LANES_INLINE F32 absolute(const F32& x) { return float_of(bits_of(x) & U32(0x7fffffffu)); }
LANES_INLINE F32 square_root(const F32& x) {
  return each<float>(x, [](Native<float> p) {
    for (int i = 0; i < kNative; ++i) p[i] = __builtin_sqrtf(p[i]);
    return p;
  });
}
// Exact for values below 2^31.
LANES_INLINE F32 as_float(const U32& x) {
  return each<float>(
      x, [](auto p) { return __builtin_convertvector(Native<std::int32_t>(p), Native<float>); });
}
LANES_INLINE F32 whole_part(const F32& x) {
  return each<float>(x, [](auto p) {
    return __builtin_convertvector(__builtin_convertvector(p, Native<std::int32_t>), Native<float>);
  });
}

// The second operand where the first is NaN, as the machine's own minimum and maximum do; the
// compiler does not find those instructions by itself.
LANES_INLINE F32 smaller(const F32& a, const F32& b) {
  F32 r;
  for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
    r.part[k] = _mm512_maskz_min_ps(0xffff, a.part[k], b.part[k]);
#elif defined(__AVX2__)
    r.part[k] = _mm256_min_ps(a.part[k], b.part[k]);
#elif defined(__SSE2__)
    r.part[k] = _mm_min_ps(a.part[k], b.part[k]);
#else
    r.part[k] = a.part[k] < b.part[k] ? a.part[k] : b.part[k];
#endif
  }
  return r;
}
LANES_INLINE F32 larger(const F32& a, const F32& b) {
  F32 r;
  for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
    r.part[k] = _mm512_maskz_max_ps(0xffff, a.part[k], b.part[k]);
#elif defined(__AVX2__)
    r.part[k] = _mm256_max_ps(a.part[k], b.part[k]);
#elif defined(__SSE2__)
    r.part[k] = _mm_max_ps(a.part[k], b.part[k]);
#else
    r.part[k] = a.part[k] > b.part[k] ? a.part[k] : b.part[k];
#endif
  }
  return r;
}

// 0, 1, 2, ...
LANES_INLINE U32 lane_numbers() {
  U32 r;
  for (int i = 0; i < kLanes; ++i) r.part[i / kNative][i % kNative] = std::uint32_t(i);
  return r;
}

// Reductions over the lanes, by one fixed tree.
template <class T, class F>
LANES_INLINE T reduce(const Lanes<T>& x, F f) {
  T lane[kLanes];
  memcpy(lane, x.part, sizeof lane);
  for (int n = kLanes / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) lane[i] = f(lane[i], lane[i + n]);
  return lane[0];
}
template <class T>
LANES_INLINE T sum(const Lanes<T>& x) {
  return reduce(x, [](T a, T b) { return a + b; });
}
LANES_INLINE bool all(const I32& mask) {
  return reduce(mask, [](std::int32_t a, std::int32_t b) { return a & b; }) != 0;
}

// Lanes of double are kept as arrays: they are touched once per block only.
LANES_INLINE void add_lanes(const F32& x, double (&to)[kLanes]) {
  float lane[kLanes];
  memcpy(lane, x.part, sizeof lane);
  for (int i = 0; i < kLanes; ++i) to[i] += double(lane[i]);
}
LANES_INLINE double sum(const double (&x)[kLanes]) {
  double lane[kLanes];
  memcpy(lane, x, sizeof lane);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

// ---------------------------------------------------------------------------- loads
// Loops with many operations per element keep too few loads in flight to fill the memory pipe, and
// the hardware's prefetcher stops at page ends: ask for what comes a page later.
constexpr std::int64_t kAhead = 4096;

template <class T>
LANES_INLINE void prefetch(const T* p, std::int64_t bytes = kAhead) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, 3);
}

// Part by part: the compiler would copy all lanes in 16-byte pieces by way of memory.
LANES_INLINE F32 load(const float* p) {
  F32 r;
  for (int k = 0; k < kParts; ++k) memcpy(&r.part[k], p + k * kNative, sizeof r.part[k]);
  return r;
}

// One register of 16-bit integers, widened; the compiler would convert it half by half.
LANES_INLINE Native<std::uint32_t> widened(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return Native<std::uint32_t>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return Native<std::uint32_t>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Native<std::uint16_t> h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Native<std::uint32_t>);
#endif
}

LANES_INLINE U32 load_halves(const std::uint16_t* p) {
  U32 r;
  for (int k = 0; k < kParts; ++k) r.part[k] = widened(p + k * kNative);
  return r;
}

LANES_INLINE F32 load(const bf16* p) {
  return float_of(load_halves(reinterpret_cast<const std::uint16_t*>(p)) << 16);
}

// fp16 by integer arithmetic: move exponent and mantissa into place, then correct the exponent of
// infinities and subnormals. The hardware conversions below give the same values.
LANES_INLINE F32 half_to_float(const U32& half) {
  const U32 moved = (half & U32(0x7fffu)) << 13;
  const U32 exponent = moved & U32(0x0f800000u);
  const U32 normal = moved + U32(112u << 23);
  const U32 special = moved + U32(224u << 23);
  const F32 subnormal = float_of(moved + U32(113u << 23)) - F32(6.103515625e-05f);
  U32 bits = select(exponent == U32(0x0f800000u), special, normal);
  bits = select(exponent == U32(0u), bits_of(subnormal), bits);
  return float_of(bits | ((half & U32(0x8000u)) << 16));
}

LANES_INLINE F32 load(const f16* p) {
#if defined(__AVX512F__)
  F32 r;
  r.part[0] =
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return r;
#elif defined(__F16C__)
  F32 r;
  for (int k = 0; k < kParts; ++k)
    r.part[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k * kNative)));
  return r;
#else
  return half_to_float(load_halves(reinterpret_cast<const std::uint16_t*>(p)));
#endif
}

// ---------------------------------------------------------------------------- stores
LANES_INLINE void store(const F32& x, float* p) {
  for (int k = 0; k < kParts; ++k) memcpy(p + k * kNative, &x.part[k], sizeof x.part[k]);
}

LANES_INLINE void store_halves(const U32& x, std::uint16_t* p) {
  for (int k = 0; k < kParts; ++k) {
    const auto h = __builtin_convertvector(x.part[k], Native<std::uint16_t>);
    memcpy(p + k * kNative, &h, sizeof h);
  }
}

// To nearest, ties to even; NaN stays NaN.
LANES_INLINE void store(const F32& x, bf16* p) {
  const U32 bits = bits_of(x);
  const U32 rounded = (bits + U32(0x7fffu) + ((bits >> 16) & U32(1u))) >> 16;
  store_halves(select(x == x, rounded, U32(0x7fc0u)), reinterpret_cast<std::uint16_t*>(p));
}

constexpr std::uint32_t kHalfNan = 0x7e00u;

LANES_INLINE U32 float_to_half(const F32& x) {
  const U32 sign = bits_of(x) & U32(0x80000000u);
  const U32 bits = bits_of(x) ^ sign;
  const F32 magnitude = float_of(bits);
  const U32 normal = (bits - U32(112u << 23) + U32(0xfffu) + ((bits >> 13) & U32(1u))) >> 13;
  // Adding 0.5 aligns a subnormal's last bit with the last bit of fp32's mantissa.
  const U32 subnormal = bits_of(magnitude + F32(0.5f)) - bits_of(F32(0.5f));
  U32 half = select(magnitude < F32(6.103515625e-05f), subnormal, normal);
  half = select(magnitude >= F32(65520.0f), U32(0x7c00u), half);
  return select(x == x, half | (sign >> 16), U32(kHalfNan));
}

LANES_INLINE void store(const F32& value, f16* p) {
  // One NaN for all levels: the hardware would keep its payload.
  [[maybe_unused]] const F32 x = select(value == value, value, F32(__builtin_nanf("")));
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int k = 0; k < kParts; ++k)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k * kNative),
                     _mm256_cvtps_ph(x.part[k], _MM_FROUND_TO_NEAREST_INT));
#else
  store_halves(float_to_half(value), reinterpret_cast<std::uint16_t*>(p));
#endif
}

// ---------------------------------------------------------------------------- tails
// The first n < kLanes elements; the other lanes are 0.
template <class T>
LANES_INLINE F32 load(const T* p, int n) {
  T full[kLanes] = {};
  memcpy(full, p, sizeof(T) * std::size_t(n));
  return load(full);
}
template <class T>
LANES_INLINE void store(const F32& x, T* p, int n) {
  T full[kLanes];
  store(x, full);
  memcpy(p, full, sizeof(T) * std::size_t(n));
}

}  // namespace
}  // namespace fastprune::cpu
