// Copies: long segments, and the kept columns of one row.
#pragma once

#include "cpu/level.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {

constexpr int kVectorBytes = kNative * 4;
constexpr std::int64_t kLine = 64;
constexpr std::int64_t kPage = 4096;
constexpr int kStreams = 4;  // pages copied side by side: more loads in flight than one page gives

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

// kStreams neighbouring pieces of `length` bytes, a multiple of a line.
template <void (*Line)(char*, const char*)>
LANES_INLINE void copy_side_by_side(char* dst, const char* src, std::int64_t length) {
  for (std::int64_t i = 0; i < length; i += kLine)
    for (int k = 0; k < kStreams; ++k) Line(dst + k * length + i, src + k * length + i);
}

template <void (*Line)(char*, const char*)>
void copy_lines(char* dst, const char* src, std::int64_t bytes) {
  const std::int64_t misaligned = std::int64_t(reinterpret_cast<std::uintptr_t>(dst) % kLine);
  std::int64_t head = misaligned ? kLine - misaligned : 0;
  if (head > bytes) head = bytes;
  memcpy(dst, src, std::size_t(head));
  std::int64_t i = head;
  for (; i + kStreams * kPage <= bytes; i += kStreams * kPage)
    copy_side_by_side<Line>(dst + i, src + i, kPage);
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

// Blocks begin to end; `dst` is where output column `origin` goes.
template <class T>
LANES_INLINE void gather_blocks(const ColumnGather& plan, const T* src, T* dst, std::int64_t origin,
                                std::int64_t begin, std::int64_t end) {
  constexpr int lanes = kVectorBytes / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  const T* picks = static_cast<const T*>(plan.picks);
  for (std::int64_t b = begin; b < end; ++b) {
    T* to = dst + (plan.first[b] - origin);
    if (plan.base[b] >= 0) {
      const T* from = src + plan.base[b];
      prefetch(from);
      Vector low, high, pick;
      memcpy(&low, from, sizeof low);
      memcpy(&high, from + lanes, sizeof high);
      memcpy(&pick, picks + b * lanes, sizeof pick);
      const Vector out = __builtin_shuffle(low, high, pick);
      memcpy(to, &out, sizeof out);
    } else {
      const std::int64_t* index = plan.index + plan.first[b];
      for (int i = 0; i < lanes; ++i) to[i] = src[index[i]];
    }
  }
}

template <class T>
void gather_row(const ColumnGather& plan, const T* src, T* dst, bool stream) {
  if (!stream) return gather_blocks(plan, src, dst, 0, 0, plan.blocks);
  // Through a buffer in the first-level cache, so that whole lines can be streamed.
  constexpr std::int64_t kBlocks = 2 * kPage / kVectorBytes;
  alignas(64) T buffer[kBlocks * kVectorBytes / sizeof(T)];
  for (std::int64_t b = 0; b < plan.blocks; b += kBlocks) {
    const std::int64_t end = plan.blocks - b < kBlocks ? plan.blocks : b + kBlocks;
    const std::int64_t origin = plan.first[b];
    const std::int64_t stop = end < plan.blocks ? plan.first[end] : plan.kept;
    gather_blocks(plan, src, buffer, origin, b, end);
    copy(dst + origin, buffer, (stop - origin) * std::int64_t(sizeof(T)), true);
  }
}

void gather_columns(const ColumnGather& plan, const void* src, void* dst, bool stream) {
  if (plan.item_size == 4)
    return gather_row(plan, static_cast<const std::uint32_t*>(src),
                      static_cast<std::uint32_t*>(dst), stream);
  return gather_row(plan, static_cast<const std::uint16_t*>(src), static_cast<std::uint16_t*>(dst),
                    stream);
}

}  // namespace
}  // namespace fastprune::cpu
