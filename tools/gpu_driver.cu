// Runs every CUDA kernel on small odd shapes in exactly sized allocations: what compute-sanitizer
// watches in tools/gpu_check.sh. Results are compared in tests/kernels, not here; the program fails
// only if a call fails.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <deque>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/ops.h"
#include "cuda/launch.cuh"

using namespace fastprune;
using fastprune::cuda::succeed;

namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

// Owns the memory and the metadata of every tensor until the program ends.
class Tensors {
 public:
  // A tensor whose memory begins `offset` elements into an allocation that ends with it, filled
  // with small positive floats of any dtype.
  Tensor make(DType dtype, std::vector<std::int64_t> shape, std::int64_t row_stride = 0,
              std::int64_t offset = 0) {
    return allocate(dtype, std::move(shape), row_stride, offset, true);
  }

  // Results and workspaces begin uninitialised: who reads them before they are written is caught.
  Tensor result(DType dtype, std::vector<std::int64_t> shape) {
    return allocate(dtype, std::move(shape), 0, 0, false);
  }
  Tensor workspace(std::int64_t size) { return result(DType::u8, {size}); }

  template <class T>
  Tensor filled(DType dtype, std::vector<std::int64_t> shape, const std::vector<T>& values) {
    const Tensor t = result(dtype, std::move(shape));
    succeed(cudaMemcpy(t.data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    return t;
  }

  // Every `step`-th of 0..length-1 in runs of `run`, on the host.
  Tensor index(std::int64_t length, std::int64_t run, std::int64_t step) {
    std::vector<std::int64_t> positions;
    for (std::int64_t i = 0; i < length; ++i)
      if (i / run % step == 0 && i / run * run + run <= length) positions.push_back(i);
    Tensor t;
    t.dtype = DType::i64;
    t.ndim = 1;
    t.shape = keep({static_cast<std::int64_t>(positions.size())});
    t.strides = keep({1});
    t.data = const_cast<std::int64_t*>(keep(std::move(positions)));
    return t;
  }

 private:
  Tensor allocate(DType dtype, std::vector<std::int64_t> shape, std::int64_t row_stride,
                  std::int64_t offset, bool fill) {
    const std::int64_t columns = shape.back();
    std::vector<std::int64_t> strides(shape.size(), 1);
    if (shape.size() == 2) strides[0] = row_stride ? row_stride : columns;
    Tensor t;
    t.dtype = dtype;
    t.device = {DeviceType::cuda, 0};
    t.ndim = static_cast<int>(shape.size());
    t.shape = keep(std::move(shape));
    t.strides = keep(std::move(strides));
    const bool any = t.numel() > 0;
    const std::int64_t last = t.ndim == 2 ? (t.rows() - 1) * t.row_stride() : 0;
    const auto bytes = static_cast<std::size_t>(any ? (offset + last + columns) * item_size(dtype)
                                                    : std::int64_t{1});
    void* memory = nullptr;
    succeed(cudaMalloc(&memory, bytes), "cudaMalloc");
    if (fill) {
      const std::vector<unsigned char> values(bytes, 0x3c);  // 0.0115, and 1.06 in fp16
      succeed(cudaMemcpy(memory, values.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    t.data = static_cast<char*>(memory) + offset * item_size(dtype);
    return t;
  }

  const std::int64_t* keep(std::vector<std::int64_t> values) {
    kept_.push_back(std::move(values));
    return kept_.back().data();
  }

  std::deque<std::vector<std::int64_t>> kept_;
};

void run_taylor(Tensors& tensors, DType dtype, std::int64_t out, std::int64_t in,
                std::int64_t offset) {
  constexpr Score kScores[] = {Score::first, Score::second, Score::mix,       Score::vector,
                               Score::l1,    Score::l2,     Score::activation};
  for (const Score score : kScores)
    for (const bool fisher : {false, true}) {
      const bool takes_h = score == Score::second || score == Score::mix;
      if (fisher && !takes_h) continue;
      TaylorParams p;
      p.score = score;
      p.w = tensors.make(dtype, {out, in}, in + offset, offset);
      if (score == Score::first || score == Score::mix || score == Score::vector ||
          (score == Score::second && !fisher))
        p.g = tensors.make(dtype, {out, in}, in + offset, offset);
      if (fisher) p.h = tensors.make(DType::f32, {out, in});
      if (score == Score::activation) p.x = tensors.make(DType::f32, {in});
      p.rows = tensors.result(DType::f32, {out});
      p.cols = tensors.result(DType::f32, {in});
      p.workspace = tensors.workspace(cuda::taylor_workspace(out, in));
      cuda::taylor(p, nullptr);
    }
}

void run_gather(Tensors& tensors) {
  GatherParams p;
  for (const DType dtype : {DType::f32, DType::bf16, DType::u8, DType::f64})
    for (const std::int64_t columns : {3, 111, 576})
      for (const std::int64_t run : {1, 8})
        for (const int dim : {0, 1}) {
          const std::int64_t rows = 131;
          const Tensor index = tensors.index(dim == 0 ? rows : columns, run, 2);
          const std::int64_t kept = index.numel();
          p.items.push_back(
              {tensors.make(dtype, {rows, columns}, columns + run - 1, run - 1), index, dim,
               tensors.result(dtype, {dim == 0 ? kept : rows, dim == 0 ? columns : kept})});
        }
  const Tensor index = tensors.index(577, 1, 3);
  p.items.push_back(
      {tensors.make(DType::bf16, {577}), index, 0, tensors.result(DType::bf16, {index.numel()})});
  p.workspace = tensors.workspace(cuda::gather_workspace(p.items));
  cuda::gather(p, nullptr);
}

void run_scan(Tensors& tensors) {
  ScanParams p;
  for (const DType dtype : kFloats)
    for (const std::int64_t offset : {0, 1})
      for (const std::int64_t length : {0, 1, 3, 111, 14336, 65537})
        p.tensors.push_back(tensors.make(dtype, {length}, 0, offset));
  std::vector<float> wild(4097, 0.5f);
  wild[7] = INFINITY;
  wild[4000] = -NAN;
  wild[13] = 1e9f;
  p.tensors.push_back(tensors.filled(DType::f32, {4097}, wild));
  const auto n = static_cast<std::int64_t>(p.tensors.size());
  p.out = tensors.result(DType::f64, {n, kScanFields});
  p.workspace = tensors.workspace(cuda::scan_workspace(p.tensors));
  cuda::scan(p, nullptr);
}

void run_adamw(Tensors& tensors, Master master, bool sound) {
  AdamWParams p;
  p.rule.master = master;
  p.rule.max_norm = 1;
  p.rule.seed = 7;
  p.rule.interval = 2;
  p.rule.growth = 2;
  p.rule.backoff = 0.5;
  p.groups = {{1e-3, 0.9, 0.999, 1e-8, 0.01}};
  std::int64_t slot = 0;
  for (const DType w : kFloats)
    for (const DType g : {w, DType::f32})
      for (const std::int64_t offset : {0, 1})
        for (const std::int64_t n : {0, 3, 111, 16387, 65537}) {
          AdamWItem item;
          item.w = tensors.make(w, {n}, 0, offset);
          item.g = tensors.make(g, {n}, 0, offset);
          item.m = tensors.make(DType::f32, {n}, 0, offset);
          item.v = tensors.make(DType::f32, {n}, 0, offset);
          if (master == Master::fp32 && w != DType::f32)
            item.master = tensors.make(DType::f32, {n}, 0, offset);
          item.slot = slot++;
          p.items.push_back(item);
        }
  if (!sound) {
    std::vector<float> gradient(111, 0.5f);
    gradient[100] = NAN;
    p.items[2].g = tensors.filled(DType::f32, {111}, gradient);
  }
  const auto slots = static_cast<std::size_t>(slot);
  p.buffers.steps = tensors.filled(DType::i64, {slot}, std::vector<std::int64_t>(slots, 3));
  p.buffers.stats = tensors.result(DType::f64, {slot, 2});
  p.buffers.total = tensors.result(DType::f64, {2});
  p.buffers.control = tensors.filled(DType::f64, {kControlFields}, std::vector<double>{8, 1, 0});
  p.buffers.workspace = tensors.workspace(cuda::adamw_workspace(p.items));
  cuda::adamw_norms(p, nullptr);
  cuda::adamw_update(p, nullptr);
  std::vector<double> control(kControlFields);
  succeed(cudaMemcpy(control.data(), p.buffers.control.data, kControlFields * sizeof(double),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  if ((control[kSkippedSteps] == 0) != sound)
    throw std::runtime_error("adamw: the step was skipped or taken against the gradients");
}

// Targets: one word, one ignored, one out of range.
void run_cross_entropy(Tensors& tensors, DType dtype, std::int64_t vocabulary,
                       std::int64_t offset) {
  for (const bool in_place : {false, true}) {
    CrossEntropyParams p;
    p.logits = tensors.make(dtype, {3, vocabulary}, vocabulary + offset, offset);
    p.targets = tensors.filled(DType::i64, {3},
                               std::vector<std::int64_t>{vocabulary - 1, kIgnored, vocabulary});
    p.loss = tensors.result(DType::f32, {3});
    p.log_normaliser = tensors.result(DType::f32, {3});
    if (in_place) p.scale = 0.5f;
    cuda::cross_entropy(p, nullptr);
    std::vector<float> loss(3);
    succeed(cudaMemcpy(loss.data(), p.loss.data, 3 * sizeof(float), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    const float expected = std::log(static_cast<float>(vocabulary));  // all logits are equal
    if (!(std::abs(loss[0] - expected) < 1e-5f) || loss[1] != 0 || !std::isnan(loss[2]))
      throw std::runtime_error("cross_entropy: a loss is wrong");
  }
}

}  // namespace

int main() {
  try {
    Tensors tensors;
    for (const DType dtype : kFloats) {
      run_taylor(tensors, dtype, 1, 1, 0);
      run_taylor(tensors, dtype, 3, 111, 0);
      run_taylor(tensors, dtype, 131, 1544, 0);
      run_taylor(tensors, dtype, 131, 577, 1);
      for (const std::int64_t vocabulary : {1, 111, 16384, 49152, 50257})
        for (const std::int64_t offset : {0, 1})
          run_cross_entropy(tensors, dtype, vocabulary, offset);
    }
    run_gather(tensors);
    run_scan(tensors);
    for (const Master master : {Master::none, Master::fp32, Master::stochastic}) {
      run_adamw(tensors, master, true);
      run_adamw(tensors, master, false);
    }
    succeed(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::puts("all kernels ran");
}
