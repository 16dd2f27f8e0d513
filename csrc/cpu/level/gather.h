// Copies: long segments, and the kept columns of one row.
#pragma once

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr int kVectorBytes = kNative * 4;

void copy(void* dst, const void* src, std::int64_t bytes) { memcpy(dst, src, std::size_t(bytes)); }

template <class T>
void gather_row(const ColumnGather& plan, const T* src, T* dst) {
  constexpr int lanes = kVectorBytes / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  const T* picks = static_cast<const T*>(plan.picks);
  for (std::int64_t b = 0; b < plan.blocks; ++b) {
    T* to = dst + plan.first[b];
    if (plan.base[b] >= 0) {
      Vector low, high, pick;
      memcpy(&low, src + plan.base[b], sizeof low);
      memcpy(&high, src + plan.base[b] + lanes, sizeof high);
      memcpy(&pick, picks + b * lanes, sizeof pick);
      const Vector out = __builtin_shuffle(low, high, pick);
      memcpy(to, &out, sizeof out);
    } else {
      const std::int64_t* index = plan.index + plan.first[b];
      for (int i = 0; i < lanes; ++i) to[i] = src[index[i]];
    }
  }
}

void gather_columns(const ColumnGather& plan, const void* src, void* dst) {
  if (plan.item_size == 4)
    return gather_row(plan, static_cast<const std::uint32_t*>(src),
                      static_cast<std::uint32_t*>(dst));
  return gather_row(plan, static_cast<const std::uint16_t*>(src), static_cast<std::uint16_t*>(dst));
}

}  // namespace
}  // namespace fastprune::cpu
