// Health of one chunk of a tensor.
#pragma once

#include <cmath>

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr std::int32_t kInfBits = 0x7f800000;

// For when sums or squares left the range in which fp32 is trustworthy.
template <class T>
void moments_in_double(const T* x, std::int64_t n, ScanPart& part) {
  part.sum = part.squares = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    float lane[kLanes];
    store(load(x + i, 1), lane);
    const double value = std::isfinite(lane[0]) ? double(lane[0]) : 0.0;
    part.sum += value;
    part.squares += value * value;
  }
}

// Lanes of one block; the sums are of few enough values to be good to a few units in the last
// place.
struct ScanBlock {
  I32 nan, inf, zeros;
  F32 lowest, highest, total, squares;
};

constexpr std::int64_t kScanBlock = 64 * kLanes;

// Kind::finite assumes that all values are finite; if the sum of squares is, they were. Kind::any
// looks at each value.
enum class Kind { finite, any };

template <Kind K, class T>
LANES_INLINE void scan_block(const T* x, std::int64_t n, ScanBlock& block) {
  block = {0, 0, 0, __builtin_inff(), -__builtin_inff(), 0.0f, 0.0f};
  const auto add = [&](const F32& value) __attribute__((always_inline)) {
    const I32 magnitude = as_int(bits_of(absolute(value)));
    block.zeros = block.zeros - (magnitude == I32(0));
    F32 counted = value;
    if constexpr (K == Kind::finite) {
      block.lowest = smaller(value, block.lowest);
      block.highest = larger(value, block.highest);
    } else {
      const I32 finite = magnitude < I32(kInfBits);
      block.nan = block.nan - (magnitude > I32(kInfBits));
      block.inf = block.inf - (magnitude == I32(kInfBits));
      block.lowest = smaller(select(finite, value, F32(__builtin_inff())), block.lowest);
      block.highest = larger(select(finite, value, F32(-__builtin_inff())), block.highest);
      counted = select(finite, value, F32(0.0f));
    }
    block.total = block.total + counted;
    block.squares = block.squares + counted * counted;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(x + i);
    add(load(x + i));
  }
  if (const int rest = int(n - i); rest > 0) {  // lanes beyond the end count as NaN
    add(select(as_int(lane_numbers()) < I32(rest), load(x + i, rest), F32(__builtin_nanf(""))));
    block.nan.part[0][0] -= kLanes - rest;
  }
}

template <class T>
ScanPart scan_values(const T* x, std::int64_t n) {
  I32 nan(0), inf(0), zeros(0);
  F32 lowest(__builtin_inff()), highest(-__builtin_inff());
  double total[kLanes] = {}, squares[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kScanBlock) {
    const std::int64_t length = n - i < kScanBlock ? n - i : kScanBlock;
    ScanBlock block;
    bool known = length == kScanBlock;  // what is shorter has a tail of NaN
    if (known) {
      scan_block<Kind::finite>(x + i, length, block);
      known = all(block.squares < F32(__builtin_inff()));
    }
    if (!known) scan_block<Kind::any>(x + i, length, block);
    nan = nan + block.nan;
    inf = inf + block.inf;
    zeros = zeros + block.zeros;
    lowest = smaller(block.lowest, lowest);
    highest = larger(block.highest, highest);
    add_lanes(block.total, total);
    add_lanes(block.squares, squares);
  }
  ScanPart part;
  part.nan = double(sum(nan));
  part.inf = double(sum(inf));
  part.zeros = double(sum(zeros));
  part.min = double(reduce(lowest, [](float a, float b) { return b < a ? b : a; }));
  part.max = double(reduce(highest, [](float a, float b) { return b > a ? b : a; }));
  part.sum = sum(total);
  part.squares = sum(squares);
  const bool trustworthy = part.squares > 1e-20 && part.squares < 1e37;
  if (!trustworthy && part.nan + part.inf + part.zeros < double(n)) moments_in_double(x, n, part);
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
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(x + i);
    add(load(x + i));
  }
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
