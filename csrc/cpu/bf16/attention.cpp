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

#include "core/math.h"
#include "cpu/level/vec.h"

namespace fastprune::cpu {
namespace {  // as in the levels, nothing of this may be linked into the rest

constexpr int kBlock = int(kAttentionBlock);
constexpr int kWide = kBlock / kLanes;  // vectors across a block of queries
constexpr float kInfinity = __builtin_inff();

LANES_INLINE std::int64_t rows_in_block(std::int64_t n, std::int64_t block) {
  const std::int64_t left = n - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// Two neighbouring bf16 of a row, the lower index in the lower half.
using Pair = std::uint32_t;

LANES_INLINE Pair pair_at(const bf16* p) {
  Pair pair;
  memcpy(&pair, p, sizeof pair);
  return pair;
}

// ---------------------------------------------------------------------------- products
// c[r][lane] = sum over p of a[r][2 p] low(b[p][lane]) + a[r][2 p + 1] high(b[p][lane]), added to
// what is in c where `add`. Four rows and up to four vectors of c stay in registers.
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
      const auto row = (__m512bh)_mm512_set1_epi32(int(pair_at(a + r * a_stride + 2 * p)));
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

// The same over a whole matrix: a (rows, 2 pairs), b (pairs, columns), c (rows, columns), with rows
// a multiple of 4 and columns of 16.
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

// ---------------------------------------------------------------------------- layouts
// Pairs along a row become rows: to (d / 2, kBlock), a lane per row, zeros beyond `rows`.
void rows_to_lanes(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t d,
                   Pair* to) {
  for (std::int64_t r = 0; r < kBlock; ++r)
    for (std::int64_t p = 0; p < d / 2; ++p)
      to[p * kBlock + r] = r < rows ? pair_at(from + r * stride + 2 * p) : 0;
}

void lanes_to_rows(const Pair* from, std::int64_t rows, std::int64_t d, bf16* to,
                   std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t p = 0; p < d / 2; ++p)
      memcpy(to + r * stride + 2 * p, from + p * kBlock + r, sizeof(Pair));
}

// Pairs of neighbouring rows: to (kBlock / 2, d), zeros beyond `rows`.
void pair_rows(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t d, Pair* to) {
  for (std::int64_t r = 0; r < kBlock; r += 2)
    for (std::int64_t c = 0; c < d; ++c) {
      const Pair low = r < rows ? from[r * stride + c].bits : 0;
      const Pair high = r + 1 < rows ? from[(r + 1) * stride + c].bits : 0;
      to[r / 2 * d + c] = low | high << 16;
    }
}

// columns[c][r] = from[r][c], zeros beyond `rows` up to `padded`.
void transpose(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t padded,
               std::int64_t d, bf16* columns) {
  for (std::int64_t first = 0; first < padded; first += kBlock)
    for (std::int64_t c = 0; c < d; ++c)
      for (std::int64_t r = first; r < first + kBlock; ++r)
        columns[c * padded + r] = r < rows ? from[r * stride + c] : bf16{0};
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

// The score of key `row` of a block, -inf for the queries of the same block that precede it.
LANES_INLINE F32 score(const float* scores, int row, int v, bool diagonal) {
  const F32 s = load(scores + row * kBlock + v * kLanes);
  if (!diagonal) return s;
  return select(as_int(lane_numbers()) < I32(row - v * kLanes), F32(-kInfinity), s);
}

}  // namespace

void attention_columns(std::int64_t n, std::int64_t d, HeadRows v, bf16* columns) {
  transpose(v.data, v.stride, n, padded_rows(n), d, columns);
}

void attention_block(const AttentionHead& head, const bf16* v_columns, std::int64_t block,
                     MutableHeadRows out, float* log_sums) {
  const std::int64_t n = head.n, d = head.d, padded = padded_rows(n), first = block * kBlock;
  const std::int64_t rows = rows_in_block(n, block);
  alignas(64) Pair q[kMaxHeadDim / 2 * kBlock];
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) Pair weights[kBlock / 2 * kBlock];
  alignas(64) float outputs[kMaxHeadDim * kBlock];  // (d, kBlock)
  bf16 copy[kBlock * kMaxHeadDim];
  rows_to_lanes(head.q.data + first * head.q.stride, head.q.stride, rows, d, q);
  memset(outputs, 0, std::size_t(d * kBlock) * sizeof(float));

  const F32 scale(head.scale);
  F32 tops[kWide], sums[kWide];
  for (int v = 0; v < kWide; ++v) tops[v] = F32(-kInfinity), sums[v] = F32(0.0f);
  for (std::int64_t key = 0; key <= first; key += kBlock) {
    const HeadRows k = whole_block(head.k, key, n, d, copy);
    multiply(k.data, k.stride, kBlock, q, kBlock, d / 2, scores, false);
    for (int v = 0; v < kWide; ++v) {
      F32 top = tops[v];
      for (int r = 0; r < kBlock; ++r) top = larger(score(scores, r, v, key == first), top);
      const F32 fall = exponential((tops[v] - top) * scale);
      F32 sum = sums[v] * fall;
      for (int r = 0; r < kBlock; r += 2) {
        const F32 low = exponential((score(scores, r, v, key == first) - top) * scale);
        const F32 high = exponential((score(scores, r + 1, v, key == first) - top) * scale);
        sum = sum + (low + high);
        store_pairs(low, high, weights + r / 2 * kBlock + v * kLanes);
      }
      tops[v] = top;
      sums[v] = sum;
      for (std::int64_t c = 0; c < d; ++c) {
        float* at = outputs + c * kBlock + v * kLanes;
        store(load(at) * fall, at);
      }
    }
    multiply(v_columns + key, padded, d, weights, kBlock, kBlock / 2, outputs, true);
  }

  F32 factors[kWide];
  float logs[kBlock];
  for (int v = 0; v < kWide; ++v) {
    factors[v] = F32(1.0f) / sums[v];
    store(tops[v] * scale, logs + v * kLanes);
    for (int i = 0; i < kLanes; ++i) logs[v * kLanes + i] += logf(sums[v].part[0][i]);
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
                     const float* inner, float factor, bool diagonal, bf16* weights, bf16* ds,
                     Pair* ds_pairs) {
  const F32 scale(factor);
  for (int v = 0; v < kWide; ++v) {
    const F32 log_sum = load(log_sums + v * kLanes), mean = load(inner + v * kLanes);
    const auto at = [&](int r) __attribute__((always_inline)) {
      const std::int64_t place = r * kBlock + v * kLanes;
      const F32 p = exponential(score(scores, r, v, diagonal) * scale - log_sum);
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

}  // namespace

std::int64_t attention_head_workspace(std::int64_t n, std::int64_t d) { return places(n, d).end; }

void attention_backward_head(const AttentionHead& head, const AttentionGradients& g) {
  const std::int64_t n = head.n, d = head.d, padded = padded_rows(n), blocks = padded / kBlock;
  const Places place = places(n, d);
  char* memory = static_cast<char*>(g.workspace);
  const auto pairs_at = [&](std::int64_t byte) { return reinterpret_cast<Pair*>(memory + byte); };
  const auto floats_at = [&](std::int64_t byte) { return reinterpret_cast<float*>(memory + byte); };
  Pair *const q_lanes = pairs_at(place.q_lanes), *const q_pairs = pairs_at(place.q_pairs);
  Pair *const o_lanes = pairs_at(place.o_lanes), *const o_pairs = pairs_at(place.o_pairs);
  bf16* const k_columns = reinterpret_cast<bf16*>(memory + place.k_columns);
  float* const grad_q = floats_at(place.grad_q);      // (blocks, d, kBlock)
  float* const log_sums = floats_at(place.log_sums);  // (padded,), inf beyond n: weights of 0
  float* const inner = floats_at(place.inner);        // (padded,)
  const std::int64_t block_pairs = d / 2 * kBlock;

  transpose(head.k.data, head.k.stride, n, padded, d, k_columns);
  memset(grad_q, 0, std::size_t(padded * d) * sizeof(float));
  for (std::int64_t i = 0; i < padded; ++i) {
    log_sums[i] = i < n ? g.log_sums[i] : kInfinity;
    F32 products(0.0f);
    for (std::int64_t c = 0; i < n && c < d; c += kLanes)
      products = products + load(g.out.data + i * g.out.stride + c) *
                                load(g.grad_out.data + i * g.grad_out.stride + c);
    inner[i] = sum(products);
  }
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
  for (std::int64_t j = 0; j < blocks; ++j) {
    const HeadRows k = whole_block(head.k, j * kBlock, n, d, k_copy);
    const HeadRows v = whole_block(head.v, j * kBlock, n, d, v_copy);
    float *const dk = g.grad_k + j * kBlock * d, *const dv = g.grad_v + j * kBlock * d;
    for (std::int64_t i = j; i < blocks; ++i) {
      multiply(k.data, k.stride, kBlock, q_lanes + i * block_pairs, kBlock, d / 2, scores, false);
      multiply(v.data, v.stride, kBlock, o_lanes + i * block_pairs, kBlock, d / 2, grads, false);
      block_gradients(scores, grads, log_sums + i * kBlock, inner + i * kBlock, head.scale, i == j,
                      weights, ds, ds_pairs);
      multiply(weights, kBlock, kBlock, o_pairs + i * block_pairs, d, kBlock / 2, dv, i > j);
      multiply(ds, kBlock, kBlock, q_pairs + i * block_pairs, d, kBlock / 2, dk, i > j);
      multiply(k_columns + j * kBlock, padded, d, ds_pairs, kBlock, kBlock / 2,
               grad_q + i * d * kBlock, true);
    }
  }
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
