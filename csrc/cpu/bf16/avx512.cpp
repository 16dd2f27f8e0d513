// Products of blocks by vdpbf16ps, which multiplies pairs of neighbours: pairs of a row are
// broadcast, and four rows by up to four vectors of sums stay in registers.
#include <cstring>

#include "cpu/bf16/products.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {  // as in the levels, nothing of this may be linked into the rest

constexpr int kRows = 4;

template <int kVectors>
LANES_INLINE void multiply_tile(const bf16* a, std::int64_t a_stride, const Pair* b,
                                std::int64_t b_stride, std::int64_t pairs, float* c,
                                std::int64_t c_stride, bool add) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + v * kLanes) : _mm512_setzero_ps();
  for (std::int64_t p = 0; p < pairs; ++p) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      columns[v] = (__m512bh)_mm512_loadu_si512(b + p * b_stride + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Pair pair;
      memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
      const auto row = (__m512bh)_mm512_set1_epi32(int(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * c_stride + v * kLanes, sums[r][v]);
}

template <int kVectors>
void multiply_strip(const bf16* a, std::int64_t a_stride, std::int64_t rows, const Pair* b,
                    std::int64_t columns, std::int64_t pairs, float* c, bool add) {
  for (std::int64_t r = 0; r < rows; r += kRows)
    multiply_tile<kVectors>(a + r * a_stride, a_stride, b, columns, pairs, c + r * columns, columns,
                            add);
}

void multiply(const bf16* a, std::int64_t a_stride, std::int64_t rows, const Pair* b,
              std::int64_t columns, std::int64_t pairs, float* c, bool add) {
  constexpr decltype(&multiply_strip<4>) kStrips[] = {multiply_strip<1>, multiply_strip<2>,
                                                      multiply_strip<3>, multiply_strip<4>};
  for (std::int64_t done = 0, vectors = 0; done < columns; done += vectors * kLanes) {
    const std::int64_t left = (columns - done) / kLanes;
    vectors = left < 4 ? left : 4;
    kStrips[vectors - 1](a, a_stride, rows, b + done, columns, pairs, c + done, add);
  }
}

void nothing() {}

}  // namespace

const BlockProducts avx512_products = {nothing, nothing, multiply};

}  // namespace fastprune::cpu
