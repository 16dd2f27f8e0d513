// The loops of attention. They need the processor's own bf16 products, which the levels do not have
// in common, so they are compiled once, apart from them.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/ops.h"
#include "cpu/bf16/products.h"

namespace fastprune::cpu {

constexpr std::int64_t kAttentionBlock = 64;  // queries or keys that are taken together

// One head of one sequence: n rows of d values each; strides in elements.
struct HeadRows {
  const bf16* data;
  std::int64_t stride;
};
struct MutableHeadRows {
  bf16* data;
  std::int64_t stride;
};

struct AttentionHead {
  std::int64_t n, d;
  float scale;
  HeadRows q, k, v;
};

// n rounded up to whole blocks, `padded` below.
static inline std::int64_t padded_rows(std::int64_t n) {
  return (n + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock;
}

struct AttentionGradients {
  HeadRows out, grad_out;
  const float* log_sums;   // (n,)
  MutableHeadRows grad_q;  // result
  float *grad_k, *grad_v;  // (padded, d) each, results
  void* workspace;         // attention_head_workspace(n, d) bytes, aligned to 64
};

// Transposes v by blocks: columns is (blocks, d, kAttentionBlock), zeros beyond n.
void attention_columns(std::int64_t n, std::int64_t d, HeadRows v, bf16* columns);
// One block of queries: their outputs and the logarithm of their sum of exponentials.
// v_columns: of attention_columns; v itself is not read.
void attention_block(const AttentionHead&, const BlockProducts&, const bf16* v_columns,
                     std::int64_t block, MutableHeadRows out, float* log_sums);
std::int64_t attention_head_workspace(std::int64_t n, std::int64_t d);
void attention_backward_head(const AttentionHead&, const BlockProducts&, const AttentionGradients&);
// to = the sum over `heads` of (padded, d) matrices that lie one after the other.
void attention_sum(const float* parts, std::int64_t heads, std::int64_t n, std::int64_t d,
                   MutableHeadRows to);

}  // namespace fastprune::cpu
