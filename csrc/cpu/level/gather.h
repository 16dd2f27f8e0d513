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

// R rows side by side, so that a block's plan is read once and R streams of loads are in flight.
template <class T, int R>
struct RowsOfColumns {
  static constexpr int kBlock = kVectorBytes / int(sizeof(T));  // columns of one block
  typedef T Vector __attribute__((vector_size(kVectorBytes)));

  const ColumnGather& plan;

  // Blocks begin to end of each row; `to` is where output column `origin` goes.
  LANES_INLINE void blocks(const T* const (&from)[R], T* const (&to)[R], std::int64_t origin,
                           std::int64_t begin, std::int64_t end) const {
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t first = plan.first[b], base = plan.base[b];
      if (base < 0) {
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < kBlock; ++i)
            to[r][first - origin + i] = from[r][plan.index[first + i]];
        continue;
      }
      Vector pick;
      memcpy(&pick, static_cast<const T*>(plan.picks) + b * kBlock, sizeof pick);
      for (int r = 0; r < R; ++r) {
        prefetch(from[r] + base);
        Vector low, high;
        memcpy(&low, from[r] + base, sizeof low);
        memcpy(&high, from[r] + base + kBlock, sizeof high);
        const Vector out = __builtin_shuffle(low, high, pick);
        memcpy(to[r] + (first - origin), &out, sizeof out);
      }
    }
  }

  void direct(const T* const (&from)[R], T* const (&to)[R]) const {
    blocks(from, to, 0, 0, plan.blocks);
  }

  // Through a buffer in the first-level cache, so that whole lines can be streamed.
  void streamed(const T* const (&from)[R], T* const (&to)[R]) const {
    constexpr std::int64_t kBlocks = kPage / kVectorBytes;
    alignas(64) T buffer[R][kBlocks * kBlock];
    T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = buffer[r];
    for (std::int64_t b = 0; b < plan.blocks; b += kBlocks) {
      const std::int64_t end = plan.blocks - b < kBlocks ? plan.blocks : b + kBlocks;
      const std::int64_t origin = plan.first[b];
      const std::int64_t stop = end < plan.blocks ? plan.first[end] : plan.kept;
      blocks(from, rows, origin, b, end);
      for (int r = 0; r < R; ++r)
        copy(to[r] + origin, rows[r], (stop - origin) * std::int64_t(sizeof(T)), true);
    }
  }

  void run(const T* src, std::int64_t src_stride, T* dst, bool stream) const {
    const T* from[R];
    T* to[R];
    for (int r = 0; r < R; ++r) {
      from[r] = src + r * src_stride;
      to[r] = dst + r * plan.kept;
    }
    stream ? streamed(from, to) : direct(from, to);
  }
};

template <class T>
void gather_rows(const ColumnGather& plan, const void* src, std::int64_t src_stride, void* dst,
                 std::int64_t rows, bool stream) {
  const T* from = static_cast<const T*>(src);
  T* to = static_cast<T*>(dst);
  std::int64_t r = 0;
  for (; r + kStreams <= rows; r += kStreams)
    RowsOfColumns<T, kStreams>{plan}.run(from + r * src_stride, src_stride, to + r * plan.kept,
                                         stream);
  for (; r < rows; ++r)
    RowsOfColumns<T, 1>{plan}.run(from + r * src_stride, src_stride, to + r * plan.kept, stream);
}

void gather_columns(const ColumnGather& plan, const void* src, std::int64_t src_stride, void* dst,
                    std::int64_t rows, bool stream) {
  const auto gather = plan.item_size == 4 ? gather_rows<std::uint32_t> : gather_rows<std::uint16_t>;
  gather(plan, src, src_stride, dst, rows, stream);
}

}  // namespace
}  // namespace fastprune::cpu
