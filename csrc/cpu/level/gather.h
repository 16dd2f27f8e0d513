// Copies: long segments, and the kept columns of one row.
#pragma once

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr int kVectorBytes = kNative * 4;
constexpr std::int64_t kLine = 64;
constexpr std::int64_t kPage = 4096;

// One cache line to an address that is a multiple of 64, not through the caches where the machine
// has such stores.
LANES_INLINE void stream_line(char* dst, const char* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#else
  memcpy(dst, src, kLine);
#endif
}

LANES_INLINE void plain_line(char* dst, const char* src) { memcpy(dst, src, kLine); }

template <void (*Line)(char*, const char*)>
void copy_lines(char* dst, const char* src, std::int64_t bytes) {
  const std::int64_t misaligned = std::int64_t(reinterpret_cast<std::uintptr_t>(dst) % kLine);
  std::int64_t head = misaligned ? kLine - misaligned : 0;
  if (head > bytes) head = bytes;
  memcpy(dst, src, std::size_t(head));
  std::int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    prefetch(src + i);
    Line(dst + i, src + i);
  }
  memcpy(dst + i, src + i, std::size_t(bytes - i));
}

void copy(void* dst, const void* src, std::int64_t bytes, bool stream) {
  const auto lines = stream ? copy_lines<stream_line> : copy_lines<plain_line>;
  lines(static_cast<char*>(dst), static_cast<const char*>(src), bytes);
}

void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Row by row: what is needed next mostly lies next to it.
template <class T>
struct RowOfColumns {
  static constexpr int kBlock = kVectorBytes / int(sizeof(T));  // columns of one block
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef std::uint16_t Picks __attribute__((vector_size(2 * kBlock)));

  const ColumnGather plan;  // a copy: what is stored could otherwise be part of it

  std::int64_t first(std::int64_t block) const {
    const std::int64_t column = block * kBlock;
    return column + kBlock <= plan.kept ? column : plan.kept - kBlock;
  }

  // Blocks begin to end; output column `origin` goes to `to`.
  LANES_INLINE void blocks(const T* from, T* to, std::int64_t origin, std::int64_t begin,
                           std::int64_t end) const {
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t base = plan.base[b];
      T* out = to + (first(b) - origin);
      prefetch(from + plan.ahead[b], 0);
      prefetch(from + plan.ahead[b] + kBlock, 0);
      if (base < 0) {
        for (int i = 0; i < kBlock; ++i) out[i] = from[plan.index[first(b) + i]];
        continue;
      }
      Picks picks;
      memcpy(&picks, plan.picks + b * kBlock, sizeof picks);
      Vector low, high;
      memcpy(&low, from + base, sizeof low);
      memcpy(&high, from + base + kBlock, sizeof high);
      const Vector kept = __builtin_shuffle(low, high, __builtin_convertvector(picks, Vector));
      memcpy(out, &kept, sizeof kept);
    }
  }

  // Through a buffer in the first-level cache, so that whole lines can be streamed.
  LANES_INLINE void streamed(const T* from, T* to) const {
    constexpr std::int64_t kBlocks = kPage / kVectorBytes;
    alignas(64) T buffer[kBlocks * kBlock];
    for (std::int64_t b = 0; b < plan.blocks; b += kBlocks) {
      const std::int64_t end = plan.blocks - b < kBlocks ? plan.blocks : b + kBlocks;
      const std::int64_t origin = first(b);
      const std::int64_t stop = end < plan.blocks ? first(end) : plan.kept;
      blocks(from, buffer, origin, b, end);
      copy(to + origin, buffer, (stop - origin) * std::int64_t(sizeof(T)), true);
    }
  }

  void run(const T* from, std::int64_t stride, T* to, std::int64_t rows, bool stream) const {
    for (std::int64_t r = 0; r < rows; ++r, from += stride, to += plan.kept)
      stream ? streamed(from, to) : blocks(from, to, 0, 0, plan.blocks);
  }
};

void gather_columns(const ColumnGather& plan, const void* src, std::int64_t src_stride, void* dst,
                    std::int64_t rows, bool stream) {
  const auto gather = [&](auto item) {
    using T = decltype(item);
    RowOfColumns<T>{plan}.run(static_cast<const T*>(src), src_stride, static_cast<T*>(dst), rows,
                              stream);
  };
  plan.item_size == 4 ? gather(std::uint32_t{}) : gather(std::uint16_t{});
}

}  // namespace
}  // namespace fastprune::cpu
