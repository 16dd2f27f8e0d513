// The softmax of one row of logits: its sum of exponentials, and the gradient of the loss.
#pragma once

#include <cmath>

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

// A block is read twice, for its largest value and then for its exponentials, the second time from
// the first-level cache. A lane's fp32 sum is of so few values that it is good to a few ulp.
constexpr std::int64_t kExpBlock = 64 * kLanes;

// Lanes beyond the end are -inf, whose exponential is 0.
template <class T, class Visit>
LANES_INLINE void for_each_lanes(const T* x, std::int64_t n, Visit visit) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(load(x + i));
  if (const int rest = int(n - i); rest > 0)
    visit(select(as_int(lane_numbers()) < I32(rest), load(x + i, rest), F32(-__builtin_inff())));
}

template <class T>
ExpSum exp_sum_of(const T* x, std::int64_t n) {
  float highest = -__builtin_inff(), shift = 0;
  double sums[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kExpBlock) {
    const std::int64_t length = n - i < kExpBlock ? n - i : kExpBlock;
    for (std::int64_t byte = 0; byte < length * std::int64_t(sizeof(T)); byte += 64)
      prefetch(x + i, kExpBlock * std::int64_t(sizeof(T)) + byte);
    F32 tops(-__builtin_inff());
    for_each_lanes(x + i, length,
                   [&](const F32& v) __attribute__((always_inline)) { tops = larger(v, tops); });
    const float top = reduce(tops, [](float a, float b) { return b > a ? b : a; });
    if (top > highest) {
      const double fall = std::exp(double(highest) - double(top));
      for (double& s : sums) s *= fall;
      highest = shift = top;
    }
    F32 total(0.0f);
    for_each_lanes(x + i, length, [&](const F32& v) __attribute__((always_inline)) {
      total = total + exponential(v - F32(shift));
    });
    add_lanes(total, sums);
  }
  return {shift, sum(sums)};
}

ExpSum exp_sum(DType dtype, const void* x, std::int64_t n) {
  ExpSum result{};
  dispatch_float(dtype, [&](auto type) {
    result = exp_sum_of(static_cast<const typename decltype(type)::type*>(x), n);
  });
  return result;
}

template <class T>
void softmax_minus_onehot_of(T* x, std::int64_t n, const ExpSum& of, float scale,
                             std::int64_t target) {
  const F32 shift(of.shift), factor(float(double(scale) / of.sum));
  const auto softmax = [&](const F32& v) __attribute__((always_inline)) {
    return exponential(v - shift) * factor;
  };
  const F32 at_target = softmax(load(x + target, 1)) - F32(scale);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(softmax(load(x + i)), x + i);
  if (const int rest = int(n - i); rest > 0) store(softmax(load(x + i, rest)), x + i, rest);
  store(at_target, x + target, 1);
}

void softmax_minus_onehot(DType dtype, void* x, std::int64_t n, const ExpSum& of, float scale,
                          std::int64_t target) {
  dispatch_float(dtype, [&](auto type) {
    softmax_minus_onehot_of(static_cast<typename decltype(type)::type*>(x), n, of, scale, target);
  });
}

float value(DType dtype, const void* x, std::int64_t i) {
  float lanes[kLanes] = {};
  dispatch_float(dtype, [&](auto type) {
    store(load(static_cast<const typename decltype(type)::type*>(x) + i, 1), lanes);
  });
  return lanes[0];
}

}  // namespace
}  // namespace fastprune::cpu
