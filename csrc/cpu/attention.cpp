// Forward: one task per head and block of queries. Backward: a head is one piece of work, since the
// gradient of q adds up over the keys and those of k and v over the queries; then the heads that
// share a head of k and v are added up.
#include "cpu/attention.h"

#include <algorithm>

#include "core/check.h"
#include "core/ops.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {

struct Sizes {
  std::int64_t batch, heads, kv_heads, n, d;

  std::int64_t all_heads() const { return batch * heads; }
  std::int64_t shared() const { return heads / kv_heads; }  // heads of q to one of k and v
  // of the scores, if they stood whole
  std::int64_t bytes() const { return all_heads() * n * n * std::int64_t(sizeof(float)); }
};

Sizes sizes(const AttentionParams& p) {
  return {p.q.shape[0], p.q.shape[1], p.k.shape[1], p.q.shape[2], p.q.shape[3]};
}

// Head `number` of (batch, heads, n, d), counted through all sequences.
bf16* head_of(const Tensor& t, std::int64_t number) {
  const std::int64_t heads = t.shape[1];
  return t.as<bf16>() + number / heads * t.strides[0] + number % heads * t.strides[1];
}
HeadRows rows_of(const Tensor& t, std::int64_t number) {
  return {head_of(t, number), t.strides[2]};
}
MutableHeadRows mutable_rows_of(const Tensor& t, std::int64_t number) {
  return {head_of(t, number), t.strides[2]};
}

AttentionHead attention_head(const AttentionParams& p, const Sizes& s, std::int64_t number) {
  // heads are counted through the batch, and so are those of k and v
  const std::int64_t shared = number / s.shared();
  return {s.n, s.d, p.scale, rows_of(p.q, number), rows_of(p.k, shared), rows_of(p.v, shared)};
}

#if defined(FASTPRUNE_WITH_BF16)
// How the level in use multiplies heads of d values; nullptr where it does not.
const BlockProducts* products_for(std::int64_t d) {
#if defined(FASTPRUNE_WITH_AMX)
  if (&level() == &level_amx()) return d % 32 == 0 ? &amx_wide_products : &amx_products;
#endif
  static const bool has_products = __builtin_cpu_supports("avx512bf16");
  return has_products && &level() == &level_v4 ? &avx512_products : nullptr;
}
#endif

void require_serving(const AttentionParams& p) {
  require(attention_serves(), "attention: this processor has no AVX512-BF16, or a level below v4 ",
          "was chosen");
  check(p);
}

}  // namespace

bool attention_serves() {
#if defined(FASTPRUNE_WITH_BF16)
  return products_for(kAttentionBlock) != nullptr;
#else
  return false;
#endif
}

#if defined(FASTPRUNE_WITH_BF16)

std::int64_t attention_workspace(const Tensor& q, const Tensor& k) {
  check_attention_query(q);
  check_attention_key(q, k);
  return k.shape[0] * k.shape[1] * padded_rows(q.shape[2]) * q.shape[3] *
         std::int64_t(sizeof(bf16));
}

void attention(const AttentionParams& p) {
  require_serving(p);
  require(p.workspace.numel() >= attention_workspace(p.q, p.k),
          "attention: workspace is too small");
  const Sizes s = sizes(p);
  const std::int64_t padded = padded_rows(s.n), blocks = padded / kAttentionBlock;
  const BlockProducts& products = *products_for(s.d);
  bf16* const v_columns = p.workspace.as<bf16>();  // (batch, kv heads, blocks, d, block)
  for_each_task(s.batch * s.kv_heads, s.bytes(), [&](std::int64_t number) {
    attention_columns(s.n, s.d, rows_of(p.v, number), v_columns + number * s.d * padded);
  });
  for_each_task(s.all_heads() * blocks, s.bytes(), [&](std::int64_t task) {
    const std::int64_t number = task / blocks;
    attention_block(attention_head(p, s, number), products,
                    v_columns + number / s.shared() * s.d * padded, task % blocks,
                    mutable_rows_of(p.out, number), p.log_sums.as<float>() + number * s.n);
  });
}

std::int64_t attention_backward_workspace(const Tensor& q, std::int64_t at_once) {
  check_attention_query(q);
  require(at_once > 0, "attention: at_once must be positive, not ", at_once);
  const std::int64_t n = q.shape[2], d = q.shape[3], heads = q.shape[0] * q.shape[1];
  const std::int64_t grads = 2 * padded_rows(n) * d * std::int64_t(sizeof(float));
  return heads * grads + std::min(heads, at_once) * attention_head_workspace(n, d);
}

void attention_backward(const AttentionParams& p) {
  require_serving(p);
  require(p.workspace.numel() >= attention_backward_workspace(p.q, 1),
          "attention: workspace is too small");
  const Sizes s = sizes(p);
  const BlockProducts& products = *products_for(s.d);
  const std::int64_t size = padded_rows(s.n) * s.d, heads = s.all_heads();
  const std::int64_t each = attention_head_workspace(s.n, s.d);
  float* const grad_k = p.workspace.as<float>();  // (batch, heads, padded, d)
  float* const grad_v = grad_k + heads * size;
  char* const rest = reinterpret_cast<char*>(grad_v + heads * size);
  // As many heads at once as the workspace has room for.
  const std::int64_t room = (p.workspace.as<char>() + p.workspace.numel() - rest) / each;
  const std::int64_t at_once = std::min(heads, room);
  for_each_task(at_once, s.bytes(), [&](std::int64_t task) {
    for (std::int64_t number = task * heads / at_once; number < (task + 1) * heads / at_once;
         ++number)
      attention_backward_head(
          attention_head(p, s, number), products,
          {rows_of(p.out, number), rows_of(p.grad_out, number),
           p.log_sums.as<float>() + number * s.n, mutable_rows_of(p.grad_q, number),
           grad_k + number * size, grad_v + number * size, rest + task * each});
  });
  for_each_task(s.batch * s.kv_heads, s.bytes(), [&](std::int64_t number) {
    const std::int64_t first = number * s.shared() * size;
    attention_sum(grad_k + first, s.shared(), s.n, s.d, mutable_rows_of(p.grad_k, number));
    attention_sum(grad_v + first, s.shared(), s.n, s.d, mutable_rows_of(p.grad_v, number));
  });
}

#else

std::int64_t attention_workspace(const Tensor&, const Tensor&) { return 0; }
std::int64_t attention_backward_workspace(const Tensor&, std::int64_t) { return 0; }
void attention(const AttentionParams& p) { require_serving(p); }
void attention_backward(const AttentionParams& p) { require_serving(p); }

#endif

}  // namespace fastprune::cpu
