// The list of ops. Each has a plain params struct, one check of its arguments, and one
// implementation per backend. Outputs and workspaces are allocated by the caller; the
// *_workspace functions say how many bytes a backend wants.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace fastprune {

// ---------------------------------------------------------------------------- taylor
// One pass over a matrix of per-weight scores t(w, g, h): sums over columns and over rows.
enum class Score : std::uint8_t { first, second, mix, vector, l1, l2, activation };

struct TaylorParams {
  Score score = Score::first;
  Tensor w;          // (out, in) or (n,); float; inner stride 1, any row stride
  Tensor g;          // like w, w's dtype; absent for l1, l2, activation, and second with h
  Tensor h;          // like w, w's dtype or f32; absent means h = g * g
  Tensor x;          // (in,) f32; activation only
  Tensor rows;       // (out,) f32, result: sum over columns
  Tensor cols;       // (in,) f32, result: sum over rows
  Tensor workspace;  // bytes (u8), at least taylor_workspace(...)
};

void check(const TaylorParams& p);

// ---------------------------------------------------------------------------- gather
// Copies of selected rows (dim 0) or columns (dim 1) of many tensors in one go.
struct GatherItem {
  Tensor src;    // 1-D or 2-D, any dtype of 1, 2, 4 or 8 bytes; inner stride 1, any row stride
  Tensor index;  // (k,) i64 on the host, strictly ascending
  int dim = 0;   // 0 or 1
  Tensor dst;    // contiguous result, src's dtype
};

struct GatherParams {
  std::vector<GatherItem> items;  // all on one device
  Tensor workspace;               // bytes (u8) on that device; absent where 0 are wanted
  bool fresh = false;             // the results were just allocated and never touched
};

void check(const GatherParams& p);

// ---------------------------------------------------------------------------- scan
// Health of each tensor: one row of kScanFields doubles per tensor. Moments, minima and maxima
// are over finite values (NaN where there are none); outliers lie further than 6 sigma from the
// mean, sigma^2 = second moment - mean^2.
enum ScanField : int {
  kScanNan,
  kScanInf,
  kScanZeros,
  kScanOutliers,
  kScanMin,
  kScanMax,
  kScanAbsmax,
  kScanMean,
  kScanSecondMoment,
  kScanNumel,
  kScanFields
};

struct ScanParams {
  std::vector<Tensor> tensors;  // float, dense, all on one device
  Tensor out;                   // (tensors, kScanFields) f64
  Tensor workspace;             // bytes (u8)
};

void check(const ScanParams& p);

// ---------------------------------------------------------------------------- adamw
// A whole optimizer step in two passes. No value leaves the device between them.
//   norms:  per tensor and in total, sum of squares and count of non-finite values of g/scale
//   update: nothing if the step is unsound (see sound_step in math.h), else clip and update
enum class Master : std::uint8_t { none, fp32, stochastic };

enum ControlField : int { kLossScale, kSoundSteps, kSkippedSteps, kControlFields };

struct AdamWGroup {  // hyperparameters
  double lr, beta1, beta2, eps, weight_decay;
};

struct AdamWItem {
  Tensor w;               // float, dense; every tensor of an item has w's layout
  Tensor g;               // float
  Tensor m, v;            // f32 moments
  Tensor master;          // f32 weights, present exactly for Master::fp32 with half-precision w
  int group = 0;          // index into AdamWParams::groups
  std::int64_t slot = 0;  // row of steps and stats that belongs to this parameter
};

struct AdamWBuffers {  // what is kept from step to step beside the items
  Tensor steps;        // (slots,) i64, steps taken; rises by 1 for each item of a sound step
  Tensor stats;        // (slots, 2) f64: sum of squares, non-finite count; 0 for absent slots
  Tensor total;        // (2,) f64: the same over all items; between the passes the caller may
                       //   add in other devices' totals
  Tensor control;      // (kControlFields,) f64; sound steps count since the scale changed
  Tensor workspace;    // bytes (u8)
};

struct AdamWRule {      // settings that all groups share
  double max_norm = 0;  // 0: no clipping
  Master master = Master::none;
  std::uint64_t seed = 0;          // stochastic rounding
  double growth = 1, backoff = 1;  // loss scale factors after `interval` sound steps, after a skip
  std::int64_t interval = 0;       // 0: the loss scale is constant
};

struct AdamWParams {
  std::vector<AdamWItem> items;  // all on one device; slots distinct
  std::vector<AdamWGroup> groups;
  AdamWBuffers buffers;
  AdamWRule rule;
};

void check(const AdamWParams& p);

// ---------------------------------------------------------------------------- cross_entropy
// Loss of each row of logits against its target, and on demand the gradient in their place.
constexpr std::int64_t kIgnored = -100;  // target of a row that is not scored, as in torch

struct CrossEntropyParams {
  Tensor logits;               // (rows, vocabulary); float; inner stride 1, any row stride
  Tensor targets;              // (rows,) i64 in [0, vocabulary), or kIgnored: loss and gradient 0
  Tensor loss;                 // (rows,) f32, result
  Tensor log_normaliser;       // (rows,) f32, result: log of the sum of exp(logits)
  std::optional<float> scale;  // logits become scale * (softmax(logits) - onehot(target))
};

void check(const CrossEntropyParams& p);

// ---------------------------------------------------------------------------- attention
// Causal attention of whole sequences: position i attends to positions 0 to i. On a CPU with bf16
// products only; GPUs have well-kept libraries for it.
constexpr std::int64_t kMaxHeadDim = 256;

struct AttentionParams {
  Tensor q;         // (batch, heads, n, d); bf16, like all but log_sums; inner stride 1; d is a
                    //   multiple of 16 up to kMaxHeadDim
  Tensor k, v;      // (batch, kv heads, n, d); heads is a multiple of kv heads
  Tensor out;       // like q; result, and what the backward pass reads
  Tensor log_sums;  // (batch, heads, n) f32: log of each position's sum of exponentials; the same
  Tensor grad_out;  // like q; this and the rest are present in the backward pass
  Tensor grad_q, grad_k, grad_v;  // like q, k, v; results
  Tensor workspace;               // bytes (u8)
  float scale = 1;                // positive
};

void check(const AttentionParams& p);
void check_attention_query(const Tensor& q);
void check_attention_key(const Tensor& q, const Tensor& k);

// ---------------------------------------------------------------------------- backends
namespace cpu {
std::int64_t taylor_workspace(std::int64_t out, std::int64_t in);
void taylor(const TaylorParams& p);

void gather(const GatherParams& p);

std::int64_t scan_workspace(const std::vector<Tensor>& tensors);
void scan(const ScanParams& p);

std::int64_t adamw_workspace(const std::vector<AdamWItem>& items);
void adamw_norms(const AdamWParams& p);
void adamw_update(const AdamWParams& p);

void cross_entropy(const CrossEntropyParams& p);  // throws for a target out of range

bool attention_serves();  // whether this processor has what the two below need; else they throw
std::int64_t attention_workspace(const Tensor& q, const Tensor& k);
void attention(const AttentionParams& p);
std::int64_t attention_backward_workspace(const Tensor& q, std::int64_t at_once);  // in heads
void attention_backward(const AttentionParams& p);
}  // namespace cpu

// `stream` is a cudaStream_t of the tensors' device; everything is enqueued on it, nothing waits.
namespace cuda {
std::int64_t taylor_workspace(std::int64_t out, std::int64_t in);
void taylor(const TaylorParams& p, void* stream);

std::int64_t gather_workspace(const std::vector<GatherItem>& items);
void gather(const GatherParams& p, void* stream);

std::int64_t scan_workspace(const std::vector<Tensor>& tensors);
void scan(const ScanParams& p, void* stream);

std::int64_t adamw_workspace(const std::vector<AdamWItem>& items);
void adamw_norms(const AdamWParams& p, void* stream);
void adamw_update(const AdamWParams& p, void* stream);

// A target out of range makes its row NaN.
void cross_entropy(const CrossEntropyParams& p, void* stream);

// Why no device can be used ("" where one can): no driver, no device, too old a driver.
std::string unavailable_reason();
}  // namespace cuda

}  // namespace fastprune
