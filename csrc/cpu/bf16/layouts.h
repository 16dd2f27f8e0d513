// A head's rows brought into the layouts that products and lanes ask for.
#pragma once

#include <cstring>

#include "cpu/attention.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {  // as in the levels, nothing of this may be linked into the rest

constexpr int kBlock = int(kAttentionBlock);
constexpr int kWide = kBlock / kLanes;  // vectors across a block of queries

// A square of pairs, one row a register, turned over its diagonal: neighbours are woven within
// quarters of the registers, then the quarters are.
LANES_INLINE void transpose_square(__m512i (&x)[kLanes]) {
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kHalves = 0xff;
  __m512i t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, x[i], x[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = _mm512_maskz_unpacklo_epi64(kHalves, t[i], t[i + 2]);
    x[i + 1] = _mm512_maskz_unpackhi_epi64(kHalves, t[i], t[i + 2]);
    x[i + 2] = _mm512_maskz_unpacklo_epi64(kHalves, t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_maskz_unpackhi_epi64(kHalves, t[i + 1], t[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[4 + i], kEven);
    t[4 + i] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[4 + i], kOdd);
    t[8 + i] = _mm512_maskz_shuffle_i32x4(kAll, x[8 + i], x[12 + i], kEven);
    t[12 + i] = _mm512_maskz_shuffle_i32x4(kAll, x[8 + i], x[12 + i], kOdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_maskz_shuffle_i32x4(kAll, t[i], t[8 + i], kEven);
    x[4 + i] = _mm512_maskz_shuffle_i32x4(kAll, t[4 + i], t[12 + i], kEven);
    x[8 + i] = _mm512_maskz_shuffle_i32x4(kAll, t[i], t[8 + i], kOdd);
    x[12 + i] = _mm512_maskz_shuffle_i32x4(kAll, t[4 + i], t[12 + i], kOdd);
  }
}

// The first `n` lanes, or all.
LANES_INLINE __mmask16 first_lanes(std::int64_t n) {
  return n < kLanes ? __mmask16((1u << n) - 1) : __mmask16(0xffff);
}

// to[c][r] = from[r][c] for pairs at r < rows and c < columns, 0 for r up to `width`. Strides in
// values, that is half pairs.
void transpose_pairs(const bf16* from, std::int64_t from_stride, std::int64_t rows,
                     std::int64_t columns, bf16* to, std::int64_t to_stride, std::int64_t width) {
  for (std::int64_t r = 0; r < width; r += kLanes)
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const __mmask16 across = first_lanes(columns - c), down = first_lanes(width - r);
      __m512i square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        square[i] = r + i < rows
                        ? _mm512_maskz_loadu_epi32(across, from + (r + i) * from_stride + 2 * c)
                        : _mm512_setzero_si512();
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (c + i < columns)
          _mm512_mask_storeu_epi32(to + (c + i) * to_stride + 2 * r, down, square[i]);
    }
}

// Pairs along a row become rows: to (d / 2, kBlock), a lane per row, zeros beyond `rows`.
void rows_to_lanes(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t d,
                   Pair* to) {
  transpose_pairs(from, stride, rows, d / 2, reinterpret_cast<bf16*>(to), 2 * kBlock, kBlock);
}

void lanes_to_rows(const Pair* from, std::int64_t rows, std::int64_t d, bf16* to,
                   std::int64_t stride) {
  transpose_pairs(reinterpret_cast<const bf16*>(from), 2 * kBlock, d / 2, rows, to, stride, d / 2);
}

// Pairs of neighbouring rows: to (kBlock / 2, d), zeros beyond `rows`.
void pair_rows(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t d, Pair* to) {
  const auto row = [&](std::int64_t r, std::int64_t c) __attribute__((always_inline)) {
    const auto* at = reinterpret_cast<const std::uint16_t*>(from + r * stride + c);
    return r < rows ? load_halves(at) : U32(0u);
  };
  for (std::int64_t r = 0; r < kBlock; r += 2)
    for (std::int64_t c = 0; c < d; c += kLanes) {
      const U32 pairs = row(r, c) | row(r + 1, c) << 16;
      _mm512_storeu_si512(to + r / 2 * d + c, __m512i(pairs.part[0]));
    }
}

// A block of rows transposed: columns (d, kBlock), zeros beyond `rows`.
void rows_to_columns(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t d,
                     bf16* columns) {
  alignas(64) Pair lanes[kMaxHeadDim / 2 * kBlock];
  rows_to_lanes(from, stride, rows, d, lanes);
  for (std::int64_t p = 0; p < d / 2; ++p)
    for (int r = 0; r < kBlock; r += kLanes) {
      U32 pairs;
      memcpy(pairs.part, lanes + p * kBlock + r, sizeof pairs);
      auto* to = reinterpret_cast<std::uint16_t*>(columns + 2 * p * kBlock + r);
      store_halves(pairs & U32(0xffffu), to);
      store_halves(pairs >> 16, to + kBlock);
    }
}

// A block of rows, or a copy of it with zeros where the matrix has ended.
HeadRows whole_block(HeadRows rows, std::int64_t first, std::int64_t n, std::int64_t d,
                     bf16* copy) {
  if (first + kBlock <= n) return {rows.data + first * rows.stride, rows.stride};
  for (std::int64_t r = 0; r < kBlock; ++r)
    for (std::int64_t c = 0; c < d; ++c)
      copy[r * d + c] = first + r < n ? rows.data[(first + r) * rows.stride + c] : bf16{0};
  return {copy, d};
}

// Two rows of fp32 lanes to pairs of bf16.
LANES_INLINE void store_pairs(const F32& low, const F32& high, Pair* to) {
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh(high.part[0], low.part[0]);
  alignas(64) static constexpr std::uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves));
}

LANES_INLINE void store_rounded(const F32& x, bf16* to) {
  const auto halves = (__m256i)_mm512_cvtneps_pbh(x.part[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

// Columns of fp32 (d, kBlock), each query's times its factor, to rows of bf16.
void write_rows(const float* columns, const F32 (&factors)[kWide], std::int64_t rows,
                std::int64_t d, bf16* to, std::int64_t stride) {
  alignas(64) Pair pairs[kMaxHeadDim / 2 * kBlock];
  for (std::int64_t c = 0; c < d; c += 2)
    for (int v = 0; v < kWide; ++v) {
      const float* at = columns + c * kBlock + v * kLanes;
      store_pairs(load(at) * factors[v], load(at + kBlock) * factors[v],
                  pairs + c / 2 * kBlock + v * kLanes);
    }
  lanes_to_rows(pairs, rows, d, to, stride);
}

}  // namespace
}  // namespace fastprune::cpu
