// Health of one chunk of a tensor.
#pragma once

#include <cmath>

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr std::int32_t kInfBits = 0x7f800000;

// fp32 squares left the range in which they are trustworthy: exact products in fp64 instead.
template <class T>
double squares_in_double(const T* x, std::int64_t n) {
  double total = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    float lane[kLanes];
    store(load(x + i, 1), lane);
    const double value = std::isfinite(lane[0]) ? double(lane[0]) : 0.0;
    total += value * value;
  }
  return total;
}

template <class T>
ScanPart scan_values(const T* x, std::int64_t n) {
  I32 nan(0), inf(0), zeros(0);
  F32 lowest(__builtin_inff()), highest(-__builtin_inff()), total(0.0f), squares(0.0f);
  const auto add = [&](const F32& value) __attribute__((always_inline)) {
    const I32 magnitude = as_int(bits_of(absolute(value)));
    const I32 finite = magnitude < I32(kInfBits);
    nan = nan - (magnitude > I32(kInfBits));
    inf = inf - (magnitude == I32(kInfBits));
    zeros = zeros - (magnitude == I32(0));
    lowest = smaller(select(finite, value, F32(__builtin_inff())), lowest);
    highest = larger(select(finite, value, F32(-__builtin_inff())), highest);
    const F32 counted = select(finite, value, F32(0.0f));
    total = total + counted;
    squares = squares + counted * counted;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i));
  const int rest = int(n - i);
  if (rest > 0)  // the lanes beyond the end count as NaN, which is taken back below
    add(select(as_int(lane_numbers()) < I32(rest), load(x + i, rest), F32(__builtin_nanf(""))));

  ScanPart part;
  part.nan = double(sum(nan) - (rest > 0 ? kLanes - rest : 0));
  part.inf = double(sum(inf));
  part.zeros = double(sum(zeros));
  part.min = double(reduce(lowest, [](float a, float b) { return b < a ? b : a; }));
  part.max = double(reduce(highest, [](float a, float b) { return b > a ? b : a; }));
  part.sum = double(sum(total));
  part.squares = double(sum(squares));
  const bool trustworthy = part.squares > 1e-20 && part.squares < 1e37;
  if (!trustworthy && part.nan + part.inf + part.zeros < double(n))
    part.squares = squares_in_double(x, n);
  return part;
}

ScanPart scan_chunk(DType dtype, const void* x, std::int64_t n) {
  ScanPart part{};
  dispatch_float(dtype, [&](auto type) {
    part = scan_values(static_cast<const typename decltype(type)::type*>(x), n);
  });
  return part;
}

template <class T>
std::int64_t outliers(const T* x, std::int64_t n, float mean, float limit) {
  I32 count(0);
  const auto add = [&](const F32& value) __attribute__((always_inline)) {
    const F32 distance = absolute(value - F32(mean));
    count = count - ((distance > F32(limit)) & (distance < F32(__builtin_inff())));
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i));
  if (const int rest = int(n - i); rest > 0)
    add(select(as_int(lane_numbers()) < I32(rest), load(x + i, rest), F32(__builtin_nanf(""))));
  return sum(count);
}

std::int64_t count_outliers(DType dtype, const void* x, std::int64_t n, float mean, float limit) {
  std::int64_t count = 0;
  dispatch_float(dtype, [&](auto type) {
    count = outliers(static_cast<const typename decltype(type)::type*>(x), n, mean, limit);
  });
  return count;
}

}  // namespace
}  // namespace fastprune::cpu
