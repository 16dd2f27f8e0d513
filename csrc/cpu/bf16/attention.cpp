// Causal attention of one head:
//   s = scale q k^T, s[i][j] = -inf for j > i;  p = softmax(s);  out = p v
// and backward, with o = out:
//   dv = p^T do;  dp = do v^T;  ds = p (dp - rowsum(do o));  dq = scale ds k;  dk = scale ds^T q
// Neither s nor p ever stands whole: a block of 64 keys meets a block of 64 queries, with running
// maxima and sums (FlashAttention-2, Dao 2023, arXiv 2307.08691). Lanes are queries: a block of s
// is kept with a row per key, so what belongs to a query (its maximum, its sum) is a lane of a
// vector, and no reduction goes across one.
#include "cpu/attention.h"

#include <cmath>

#include "cpu/bf16/layouts.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {  // as in the levels, nothing of this may be linked into the rest

constexpr float kInfinity = __builtin_inff(), kLog2OfE = 1.44269504f;

LANES_INLINE std::int64_t rows_in_block(std::int64_t n, std::int64_t block) {
  const std::int64_t left = n - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// 2^x within 1.6e-7 of its value: 2^n by the processor, n the nearest integer, and 2^(x - n) by a
// polynomial that is 1 at 0. 0 for -inf, NaN for NaN.
LANES_INLINE F32 power_of_two(const F32& x) {
  constexpr float kFactors[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f,
                                2.40222424e-1f, 6.93147004e-1f, 1.0f};
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, x.part[0], _MM_FROUND_TO_NEAREST_INT);
  const __m512 rest = x.part[0] - n;
  __m512 power = _mm512_set1_ps(kFactors[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(kFactors[i]));
  F32 result;
  result.part[0] = _mm512_maskz_scalef_ps(0xffff, power, n);  // NaN times 2^-inf is 0
  return result;
}

// -inf for the queries of a block that precede a key of the same block.
void hide_later_keys(float* scores) {
  for (int row = 0; row < kBlock; ++row)
    for (int v = 0; v <= row / kLanes; ++v) {
      float* at = scores + row * kBlock + v * kLanes;
      store(select(as_int(lane_numbers()) < I32(row - v * kLanes), F32(-kInfinity), load(at)), at);
    }
}

}  // namespace

void attention_columns(std::int64_t n, std::int64_t d, HeadRows v, bf16* columns) {
  for (std::int64_t block = 0; block * kBlock < n; ++block)
    rows_to_columns(v.data + block * kBlock * v.stride, v.stride, rows_in_block(n, block), d,
                    columns + block * d * kBlock);
}

namespace {

// What a block of queries has met so far.
struct Running {
  F32 tops[kWide], sums[kWide];  // largest score, and sum of exponentials relative to it
  float* outputs;                // (d, kBlock), relative to it too
};

// Takes in a block of scores, keys by queries, and gives their weights in pairs of keys.
void soften(const float* scores, const F32& factor, std::int64_t d, Running& running,
            Pair* weights) {
  for (int v = 0; v < kWide; ++v) {
    const auto score = [&](int row) __attribute__((always_inline)) {
      return load(scores + row * kBlock + v * kLanes);
    };
    F32 tops[4] = {score(0), score(1), score(2), score(3)};
    for (int r = 4; r < kBlock; r += 4)
      for (int i = 0; i < 4; ++i) tops[i] = larger(score(r + i), tops[i]);
    const F32 top =
        larger(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])), running.tops[v]);
    const F32 fall = power_of_two((running.tops[v] - top) * factor);
    F32 sum = running.sums[v] * fall;
    for (int r = 0; r < kBlock; r += 2) {
      const F32 low = power_of_two((score(r) - top) * factor);
      const F32 high = power_of_two((score(r + 1) - top) * factor);
      sum = sum + (low + high);
      store_pairs(low, high, weights + r / 2 * kBlock + v * kLanes);
    }
    running.tops[v] = top;
    running.sums[v] = sum;
    for (std::int64_t c = 0; c < d; ++c) {
      float* at = running.outputs + c * kBlock + v * kLanes;
      store(load(at) * fall, at);
    }
  }
}

}  // namespace

void attention_block(const AttentionHead& head, const BlockProducts& products,
                     const bf16* v_columns, std::int64_t block, MutableHeadRows out,
                     float* log_sums) {
  const std::int64_t n = head.n, d = head.d, first = block * kBlock;
  const std::int64_t rows = rows_in_block(n, block);
  alignas(64) Pair q[kMaxHeadDim / 2 * kBlock];
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) Pair weights[kBlock / 2 * kBlock];
  alignas(64) float outputs[kMaxHeadDim * kBlock];  // (d, kBlock)
  bf16 copy[kBlock * kMaxHeadDim];
  rows_to_lanes(head.q.data + first * head.q.stride, head.q.stride, rows, d, q);
  memset(outputs, 0, std::size_t(d * kBlock) * sizeof(float));

  Running running;
  running.outputs = outputs;
  for (int v = 0; v < kWide; ++v) running.tops[v] = F32(-kInfinity), running.sums[v] = F32(0.0f);
  products.configure();
  for (std::int64_t key = 0; key <= first; key += kBlock) {
    const HeadRows k = whole_block(head.k, key, n, d, copy);
    products.multiply(k.data, k.stride, kBlock, q, kBlock, d / 2, scores, false);
    if (key == first) hide_later_keys(scores);
    soften(scores, F32(head.scale * kLog2OfE), d, running, weights);
    products.multiply(v_columns + key * d, kBlock, d, weights, kBlock, kBlock / 2, outputs, true);
  }
  products.release();

  F32 factors[kWide];
  float logs[kBlock];
  for (int v = 0; v < kWide; ++v) {
    factors[v] = F32(1.0f) / running.sums[v];
    store(running.tops[v] * F32(head.scale), logs + v * kLanes);
    for (int i = 0; i < kLanes; ++i) logs[v * kLanes + i] += logf(running.sums[v].part[0][i]);
  }
  memcpy(log_sums + first, logs, std::size_t(rows) * sizeof(float));
  write_rows(outputs, factors, rows, d, out.data + first * out.stride, out.stride);
}

namespace {

// Places of the backward pass's arrays in its workspace, in bytes.
struct Places {
  std::int64_t q_lanes, q_pairs, o_lanes, o_pairs, k_columns, grad_q, log_sums, inner, end;
};

Places places(std::int64_t n, std::int64_t d) {
  const std::int64_t padded = padded_rows(n), half = padded * d * 2;
  Places p{};
  p.q_pairs = p.q_lanes + half;
  p.o_lanes = p.q_pairs + half;
  p.o_pairs = p.o_lanes + half;
  p.k_columns = p.o_pairs + half;
  p.grad_q = p.k_columns + half;
  p.log_sums = p.grad_q + 2 * half;
  p.inner = p.log_sums + padded * 4;
  p.end = p.inner + padded * 4;
  return p;
}

// Weights and gradients of the scores of a block of keys (rows) and one of queries (lanes), and the
// latter as pairs of keys as well.
void block_gradients(const float* scores, const float* grads, const float* log_sums,
                     const float* inner, float factor, bf16* weights, bf16* ds, Pair* ds_pairs) {
  const F32 scale(factor);
  for (int v = 0; v < kWide; ++v) {
    const F32 log_sum = load(log_sums + v * kLanes), mean = load(inner + v * kLanes);
    const auto at = [&](int r) __attribute__((always_inline)) {
      const std::int64_t place = r * kBlock + v * kLanes;
      const F32 p = power_of_two((load(scores + place) * scale - log_sum) * F32(kLog2OfE));
      const F32 g = p * (load(grads + place) - mean) * scale;
      store_rounded(p, weights + place);
      store_rounded(g, ds + place);
      return g;
    };
    for (int r = 0; r < kBlock; r += 2) {
      const F32 low = at(r), high = at(r + 1);
      store_pairs(low, high, ds_pairs + r / 2 * kBlock + v * kLanes);
    }
  }
}

// A query's logarithm of its sum, inf beyond n for weights of 0, and rowsum(do o), both (padded,).
void query_sums(const AttentionGradients& g, std::int64_t n, std::int64_t d, float* log_sums,
                float* inner) {
  for (std::int64_t i = 0; i < padded_rows(n); ++i) {
    log_sums[i] = i < n ? g.log_sums[i] : kInfinity;
    F32 products(0.0f);
    for (std::int64_t c = 0; i < n && c < d; c += kLanes)
      products = products + load(g.out.data + i * g.out.stride + c) *
                                load(g.grad_out.data + i * g.grad_out.stride + c);
    inner[i] = sum(products);
  }
}

}  // namespace

std::int64_t attention_head_workspace(std::int64_t n, std::int64_t d) { return places(n, d).end; }

void attention_backward_head(const AttentionHead& head, const BlockProducts& products,
                             const AttentionGradients& g) {
  const std::int64_t n = head.n, d = head.d, padded = padded_rows(n), blocks = padded / kBlock;
  const Places place = places(n, d);
  char* memory = static_cast<char*>(g.workspace);
  const auto pairs_at = [&](std::int64_t byte) { return reinterpret_cast<Pair*>(memory + byte); };
  const auto floats_at = [&](std::int64_t byte) { return reinterpret_cast<float*>(memory + byte); };
  Pair *const q_lanes = pairs_at(place.q_lanes), *const q_pairs = pairs_at(place.q_pairs);
  Pair *const o_lanes = pairs_at(place.o_lanes), *const o_pairs = pairs_at(place.o_pairs);
  bf16* const k_columns = reinterpret_cast<bf16*>(memory + place.k_columns);
  float* const grad_q = floats_at(place.grad_q);      // (blocks, d, kBlock)
  float* const log_sums = floats_at(place.log_sums);  // (padded,)
  float* const inner = floats_at(place.inner);        // (padded,)
  const std::int64_t block_pairs = d / 2 * kBlock;

  attention_columns(n, d, head.k, k_columns);  // (blocks, d, kBlock)
  memset(grad_q, 0, std::size_t(padded * d) * sizeof(float));
  query_sums(g, n, d, log_sums, inner);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t rows = rows_in_block(n, b);
    const bf16* q = head.q.data + b * kBlock * head.q.stride;
    const bf16* o = g.grad_out.data + b * kBlock * g.grad_out.stride;
    rows_to_lanes(q, head.q.stride, rows, d, q_lanes + b * block_pairs);
    pair_rows(q, head.q.stride, rows, d, q_pairs + b * block_pairs);
    rows_to_lanes(o, g.grad_out.stride, rows, d, o_lanes + b * block_pairs);
    pair_rows(o, g.grad_out.stride, rows, d, o_pairs + b * block_pairs);
  }

  alignas(64) float scores[kBlock * kBlock], grads[kBlock * kBlock];
  alignas(64) bf16 weights[kBlock * kBlock], ds[kBlock * kBlock];
  alignas(64) Pair ds_pairs[kBlock / 2 * kBlock];
  bf16 k_copy[kBlock * kMaxHeadDim], v_copy[kBlock * kMaxHeadDim];
  products.configure();
  for (std::int64_t j = 0; j < blocks; ++j) {
    const HeadRows k = whole_block(head.k, j * kBlock, n, d, k_copy);
    const HeadRows v = whole_block(head.v, j * kBlock, n, d, v_copy);
    float *const dk = g.grad_k + j * kBlock * d, *const dv = g.grad_v + j * kBlock * d;
    for (std::int64_t i = j; i < blocks; ++i) {
      products.multiply(k.data, k.stride, kBlock, q_lanes + i * block_pairs, kBlock, d / 2, scores,
                        false);
      products.multiply(v.data, v.stride, kBlock, o_lanes + i * block_pairs, kBlock, d / 2, grads,
                        false);
      if (i == j) hide_later_keys(scores);
      block_gradients(scores, grads, log_sums + i * kBlock, inner + i * kBlock, head.scale, weights,
                      ds, ds_pairs);
      products.multiply(weights, kBlock, kBlock, o_pairs + i * block_pairs, d, kBlock / 2, dv,
                        i > j);
      products.multiply(ds, kBlock, kBlock, q_pairs + i * block_pairs, d, kBlock / 2, dk, i > j);
      products.multiply(k_columns + j * kBlock * d, kBlock, d, ds_pairs, kBlock, kBlock / 2,
                        grad_q + i * d * kBlock, true);
    }
  }
  products.release();
  const F32 ones[kWide] = {F32(1.0f), F32(1.0f), F32(1.0f), F32(1.0f)};
  for (std::int64_t b = 0; b < blocks; ++b)
    write_rows(grad_q + b * d * kBlock, ones, rows_in_block(n, b), d,
               g.grad_q.data + b * kBlock * g.grad_q.stride, g.grad_q.stride);
}

void attention_sum(const float* parts, std::int64_t heads, std::int64_t n, std::int64_t d,
                   MutableHeadRows to) {
  const std::int64_t size = padded_rows(n) * d;
  for (std::int64_t r = 0; r < n; ++r)
    for (std::int64_t c = 0; c < d; c += kLanes) {
      F32 total = load(parts + r * d + c);
      for (std::int64_t h = 1; h < heads; ++h) total = total + load(parts + h * size + r * d + c);
      store_rounded(total, to.data + r * to.stride + c);
    }
}

}  // namespace fastprune::cpu
