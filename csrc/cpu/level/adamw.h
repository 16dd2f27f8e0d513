// Both passes of the optimizer over one chunk of one tensor.
#pragma once

#include <cmath>

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

// Sum of squares and, only if that is not finite, a second look that leaves non-finite values out
// and counts them.
template <class T>
NormPart norm_values(const T* g, std::int64_t n, float factor) {
  // Four sums hide the latency of an addition.
  constexpr int kWays = 4;
  F32 ways[kWays];
  for (auto& way : ways) way = F32(0.0f);
  std::int64_t i = 0;
  for (; i + kWays * kLanes <= n; i += kWays * kLanes)
    for (int k = 0; k < kWays; ++k) {
      prefetch(g + i + k * kLanes);
      const F32 value = load(g + i + k * kLanes) * F32(factor);
      ways[k] = ways[k] + value * value;
    }
  for (; i < n; i += kLanes) {
    const F32 value = load(g + i, int(n - i < kLanes ? n - i : kLanes)) * F32(factor);
    ways[0] = ways[0] + value * value;
  }
  NormPart part{double(sum((ways[0] + ways[1]) + (ways[2] + ways[3]))), 0};
  if (std::isfinite(part.squares)) return part;

  part.squares = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    float lane[kLanes];
    store(load(g + i, 1) * F32(factor), lane);
    if (std::isfinite(lane[0]))
      part.squares += double(lane[0]) * double(lane[0]);
    else
      part.nonfinite += 1;
  }
  return part;
}

NormPart norm_chunk(DType dtype, const void* g, std::int64_t n, float factor) {
  NormPart part{};
  dispatch_float(dtype, [&](auto type) {
    part = norm_values(static_cast<const typename decltype(type)::type*>(g), n, factor);
  });
  return part;
}

template <Master M, class W, class G>
struct UpdateLoop {
  static constexpr bool kMaster = M == Master::fp32 && !std::is_same_v<W, float>;
  static constexpr bool kStochastic = M == Master::stochastic && !std::is_same_v<W, float>;

  const AdamWChunk chunk;  // a copy: what is stored could otherwise be part of it

  template <class... N>
  LANES_INLINE void lanes(std::int64_t i, N... n) const {
    W* weights = static_cast<W*>(chunk.w) + i;
    if constexpr (sizeof(W) < 4) {  // did not help with fp32 weights
      prefetch(static_cast<const G*>(chunk.g) + i);
      prefetch(chunk.m + i);
      prefetch(chunk.v + i);
      if constexpr (kMaster)
        prefetch(chunk.master + i);
      else
        prefetch(weights + i);
    }
    const F32 g = load(static_cast<const G*>(chunk.g) + i, n...);
    F32 m = load(chunk.m + i, n...), v = load(chunk.v + i, n...);
    const F32 old = [&] {
      if constexpr (kMaster)
        return load(chunk.master + i, n...);
      else
        return load(weights, n...);
    }();
    F32 w = adamw_weight(old, g, m, v, chunk.factors);
    store(m, chunk.m + i, n...);
    store(v, chunk.v + i, n...);
    if constexpr (kMaster) store(w, chunk.master + i, n...);
    if constexpr (kStochastic) {
      const U32 index = U32(chunk.first + std::uint32_t(i)) + lane_numbers();
      w = stochastic(w, random_bits(index, chunk.key), W{});
    }
    store(w, weights, n...);
  }

  void run() const {
    std::int64_t i = 0;
    for (; i + kLanes <= chunk.n; i += kLanes) lanes(i);
    if (i < chunk.n) lanes(i, int(chunk.n - i));
  }
};

void adamw_chunk(const AdamWChunk& chunk) {
  dispatch_float(chunk.w_dtype, [&](auto w_type) {
    dispatch_float(chunk.g_dtype, [&](auto g_type) {
      using W = typename decltype(w_type)::type;
      using G = typename decltype(g_type)::type;
      if (chunk.mode == Master::none || chunk.w_dtype == DType::f32)
        return UpdateLoop<Master::none, W, G>{chunk}.run();
      if constexpr (!std::is_same_v<W, float>) {
        if (chunk.mode == Master::fp32) return UpdateLoop<Master::fp32, W, G>{chunk}.run();
        return UpdateLoop<Master::stochastic, W, G>{chunk}.run();
      }
    });
  });
}

}  // namespace
}  // namespace fastprune::cpu
