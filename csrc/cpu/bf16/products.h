// Products of small bf16 matrices, by one of the processor's instructions for them.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace fastprune::cpu {

// Two neighbouring bf16 of a row, the lower index in the lower half.
using Pair = std::uint32_t;

struct BlockProducts {
  // A thread calls `configure` before its first product and `release` after its last.
  void (*configure)();
  void (*release)();
  // c[r][l] = sum over p of a[r][2 p] low(b[p][l]) + a[r][2 p + 1] high(b[p][l]), added to what is
  // in c where `add`: a (rows, 2 pairs), b (pairs, columns), c (rows, columns), with b and c dense.
  // Rows and columns are multiples of 16, pairs of 8.
  void (*multiply)(const bf16* a, std::int64_t a_stride, std::int64_t rows, const Pair* b,
                   std::int64_t columns, std::int64_t pairs, float* c, bool add);
};

extern const BlockProducts avx512_products;  // by AVX512-BF16
// By AMX-BF16, for whose tiles the process needs permission. The second are twice as fast, for
// pairs that are multiples of 16.
extern const BlockProducts amx_products, amx_wide_products;

}  // namespace fastprune::cpu
