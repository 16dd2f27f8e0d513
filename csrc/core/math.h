// Per-element rules, host and device. F is float, or the CPU's 16 lanes of float (cpu/level/vec.h);
// U is uint32_t or 16 lanes of it. Everything is forced inline: the CPU loops are compiled once
// per instruction-set level, and an out-of-line copy from a high level must never be linked
// into a low one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dispatch.h"
#include "core/ops.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTPRUNE_INLINE __host__ __device__ __forceinline__
#else
#define FASTPRUNE_INLINE inline __attribute__((always_inline))
#endif

namespace fastprune {

// ---------------------------------------------------------------------------- scalar vocabulary
// What the rules below are written in; vec.h has the same words for lanes.
FASTPRUNE_INLINE float absolute(float x) { return fabsf(x); }
FASTPRUNE_INLINE float square_root(float x) { return sqrtf(x); }
FASTPRUNE_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
FASTPRUNE_INLINE float as_float(std::uint32_t x) { return static_cast<float>(x); }
FASTPRUNE_INLINE float whole_part(float x) { return truncf(x); }

FASTPRUNE_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FASTPRUNE_INLINE float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

#if defined(__CUDACC__)
FASTPRUNE_INLINE float to_float(float x) { return x; }
FASTPRUNE_INLINE float to_float(bf16 x) {
  return float_of(static_cast<std::uint32_t>(x.bits) << 16);
}
FASTPRUNE_INLINE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

// To nearest, ties to even.
FASTPRUNE_INLINE void round_to(float x, float& y) { y = x; }
FASTPRUNE_INLINE void round_to(float x, bf16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
FASTPRUNE_INLINE void round_to(float x, f16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
#endif

// ---------------------------------------------------------------------------- taylor
// The score of one weight. h is the diagonal Fisher estimate, or x for activation.
template <Score S, class F>
FASTPRUNE_INLINE F score_term(F w, F g, F h) {
  if constexpr (S == Score::first) return absolute(w * g);
  if constexpr (S == Score::second) return absolute(w * w * h);
  if constexpr (S == Score::mix) return absolute(w * g - F(0.5f) * (w * w * h));
  if constexpr (S == Score::vector) return w * g;
  if constexpr (S == Score::l1) return absolute(w);
  if constexpr (S == Score::l2) return w * w;
  if constexpr (S == Score::activation) return absolute(w) * h;
}

// ---------------------------------------------------------------------------- adamw
// Unsound: a gradient that is not finite, or squares that overflow fp32 (v would become inf).
FASTPRUNE_INLINE bool sound_step(double sum_of_squares, double nonfinite) {
  return nonfinite == 0 && sum_of_squares <= 3.4028234663852886e38;
}

// Factor on every gradient: unscaling and clipping to max_norm, as clip_grad_norm_ defines it.
FASTPRUNE_INLINE float gradient_factor(double sum_of_squares, double max_norm, double loss_scale) {
  const double clip = max_norm > 0 ? max_norm / (sqrt(sum_of_squares) + 1e-6) : 1.0;
  return static_cast<float>((clip < 1.0 ? clip : 1.0) / loss_scale);
}

// What the update of one tensor needs beyond its elements; `step` counts from 1.
struct AdamWFactors {
  float gradient;             // gradient_factor
  float decay;                // 1 - lr * weight_decay
  float beta2, rest1, rest2;  // beta2, 1 - beta1, 1 - beta2
  float step_size;            // lr / (1 - beta1^step)
  float inverse_root2;        // 1 / sqrt(1 - beta2^step)
  float eps;
};

FASTPRUNE_INLINE AdamWFactors adamw_factors(const AdamWGroup& group, float gradient,
                                            std::int64_t step) {
  const double t = static_cast<double>(step);
  AdamWFactors f{};
  f.gradient = gradient;
  f.decay = static_cast<float>(1.0 - group.lr * group.weight_decay);
  f.beta2 = static_cast<float>(group.beta2);
  f.rest1 = static_cast<float>(1.0 - group.beta1);
  f.rest2 = static_cast<float>(1.0 - group.beta2);
  f.step_size = static_cast<float>(group.lr / (1.0 - pow(group.beta1, t)));
  f.inverse_root2 = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, t)));
  f.eps = static_cast<float>(group.eps);
  return f;
}

// One weight: g is the raw gradient, m and v are updated, the new weight is returned.
template <class F>
FASTPRUNE_INLINE F adamw_weight(F w, F g, F& m, F& v, const AdamWFactors& f) {
  g = g * F(f.gradient);
  m = m + F(f.rest1) * (g - m);
  v = F(f.beta2) * v + F(f.rest2) * (g * g);
  const F denominator = square_root(v) * F(f.inverse_root2) + F(f.eps);
  return w * F(f.decay) - F(f.step_size) * (m / denominator);
}

// AdamWParams::control after a step: a skip is counted, and the loss scale falls after it and
// rises after `interval` sound steps.
FASTPRUNE_INLINE void adapt_loss_scale(double* control, bool sound, double growth, double backoff,
                                       std::int64_t interval) {
  if (!sound) control[kSkippedSteps] += 1;
  if (interval == 0) return;
  control[kSoundSteps] = sound ? control[kSoundSteps] + 1 : 0;
  if (!sound) {
    control[kLossScale] *= backoff;
  } else if (control[kSoundSteps] >= static_cast<double>(interval)) {
    control[kLossScale] *= growth;
    control[kSoundSteps] = 0;
  }
}

// ---------------------------------------------------------------------------- scan
// Completes a row that holds the counts, the extremes and numel by the sums over finite values.
FASTPRUNE_INLINE void finish_scan_row(double sum, double squares, double* out) {
  const double finite = out[kScanNumel] - out[kScanNan] - out[kScanInf];
  out[kScanOutliers] = 0;
  if (finite > 0) {
    out[kScanAbsmax] = fmax(-out[kScanMin], out[kScanMax]);
    out[kScanMean] = sum / finite;
    out[kScanSecondMoment] = squares / finite;
  } else {
    out[kScanMin] = out[kScanMax] = out[kScanAbsmax] = NAN;
    out[kScanMean] = out[kScanSecondMoment] = NAN;
  }
}

// Outliers lie further than this from the mean.
FASTPRUNE_INLINE double outlier_limit(const double* row) {
  return 6.0 * sqrt(fmax(0.0, row[kScanSecondMoment] - row[kScanMean] * row[kScanMean]));
}

// ---------------------------------------------------------------------------- cross_entropy
// e^x for x <= 0 within 2 ulp; 0 where that is below the smallest normal number. NaN stays NaN.
// x = n log 2 + r, where log 2 comes in two parts of which the first times n is exact; e^r by the
// polynomial of least relative error (4e-9) for |r| <= log(2) / 2.
template <class F>
FASTPRUNE_INLINE F exponential(F x) {
  // Adding 1.5 * 2^23 leaves n in the last bits of the sum.
  const F shifted = x * F(1.44269504f) + F(12582912.0f);
  const F n = shifted - F(12582912.0f);
  const F r = (x - n * F(0.693359375f)) - n * F(-2.12194440e-4f);
  F p = r * F(1.381453942e-3f) + F(8.368745446e-3f);
  p = p * r + F(4.166838899e-2f);
  p = p * r + F(1.666652113e-1f);
  p = p * r + F(4.999999404e-1f);
  p = p * (r * r) + r + F(1.0f);
  return select(x < F(-87.3365f), F(0.0f), float_of(bits_of(p) + (bits_of(shifted) << 23)));
}

// ---------------------------------------------------------------------------- random bits
// Counter-based: the bits depend on (seed, step, slot, index) only, never on threads or order.
// A 32-bit finaliser with full avalanche (constants by C. Wellons, "lowbias32").
template <class U>
FASTPRUNE_INLINE U mix_bits(U x) {
  x = x ^ (x >> 16);
  x = x * U(0x7feb352du);
  x = x ^ (x >> 15);
  x = x * U(0x846ca68bu);
  return x ^ (x >> 16);
}

// Key of up to 2^32 consecutive elements; `high` is the index divided by 2^32.
FASTPRUNE_INLINE std::uint32_t random_key(std::uint64_t seed, std::int64_t step, std::int64_t slot,
                                          std::uint32_t high) {
  std::uint32_t key = mix_bits(static_cast<std::uint32_t>(seed) + 0x9e3779b9u);
  key = mix_bits(key ^ static_cast<std::uint32_t>(seed >> 32));
  key = mix_bits(key ^ static_cast<std::uint32_t>(step));
  key = mix_bits(key ^ static_cast<std::uint32_t>(slot));
  return mix_bits(key ^ high);
}

template <class U>
FASTPRUNE_INLINE U random_bits(U low_index, std::uint32_t key) {
  return mix_bits(low_index ^ U(key));
}

// Stochastic rounding, first half: a float that is exactly representable in the half type, or
// NaN. Adding random bits below the last kept one and truncating goes up with the probability
// of the distance, so the expected value is the input.
template <class F, class U>
FASTPRUNE_INLINE F stochastic(F x, U random, bf16) {
  const F rounded = float_of((bits_of(x) + (random >> 16)) & U(0xffff0000u));
  return select(x == x, rounded, x);
}

template <class F, class U>
FASTPRUNE_INLINE F stochastic(F x, U random, f16) {
  const U noise = random >> 19;  // 13 bits, as many as a normal number loses
  const F normal = float_of((bits_of(x) + noise) & U(0xffffe000u));
  // Below 2^-14 fp16 is a fixed grid of 2^-24.
  const F magnitude = absolute(x);
  const F grid = magnitude * F(16777216.0f) + as_float(noise) * F(0.0001220703125f);
  const F on_grid = whole_part(grid) * F(5.9604644775390625e-08f);
  const F subnormal = float_of(bits_of(on_grid) | (bits_of(x) & U(0x80000000u)));
  const F rounded = select(magnitude < F(6.103515625e-05f), subnormal, normal);
  return select(x == x, rounded, x);
}

}  // namespace fastprune
