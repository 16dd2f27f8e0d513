// The one check of each op's arguments.
#include "core/check.h"

#include "core/ops.h"

namespace fastprune {
namespace {

bool reads_gradient(const TaylorParams& p) {
  switch (p.score) {
    case Score::first:
    case Score::mix:
    case Score::vector:
      return true;
    case Score::second:
      return !p.h.present();
    case Score::l1:
    case Score::l2:
    case Score::activation:
      return false;
  }
  return false;
}

void require_matrix(const char* op, const char* arg, const Tensor& t) {
  require(t.ndim == 1 || t.ndim == 2, op, ": ", arg, " must have 1 or 2 dimensions, not ",
          ShapeOf{t});
  require(t.ndim == 1 ? t.shape[0] <= 1 || t.strides[0] == 1 : t.shape[1] <= 1 || t.strides[1] == 1,
          op, ": ", arg, " must have inner stride 1");
}

}  // namespace

void check(const TaylorParams& p) {
  constexpr const char* op = "taylor";
  const Device device = p.w.device;
  require_float(op, "w", p.w);
  require_matrix(op, "w", p.w);
  require(reads_gradient(p) == p.g.present(), op, ": this kind ",
          p.g.present() ? "does not use g" : "needs g");
  if (p.g.present()) {
    require_dtype(op, "g", p.g, p.w.dtype);
    require_device(op, "g", p.g, device);
    require_same_shape(op, "g", p.g, "w", p.w);
    require_matrix(op, "g", p.g);
  }
  if (p.h.present()) {
    require(p.score == Score::second || p.score == Score::mix, op, ": this kind does not use h");
    require(p.h.dtype == p.w.dtype || p.h.dtype == DType::f32, op,
            ": h must be float32 or w's dtype, not ", name(p.h.dtype));
    require_device(op, "h", p.h, device);
    require_same_shape(op, "h", p.h, "w", p.w);
    require_matrix(op, "h", p.h);
  }
  require((p.score == Score::activation) == p.x.present(), op, ": x belongs to kind activation");
  if (p.x.present()) {
    require_buffer(op, "x", p.x, DType::f32, p.w.cols(), device);
    require(p.x.numel() == p.w.cols(), op, ": x has shape ", ShapeOf{p.x}, ", expected (",
            p.w.cols(), ",)");
  }
  require_buffer(op, "rows", p.rows, DType::f32, p.w.rows(), device);
  require_buffer(op, "cols", p.cols, DType::f32, p.w.cols(), device);
  require_buffer(op, "workspace", p.workspace, DType::u8, 0, device);
}

void check(const GatherParams& p) {
  constexpr const char* op = "gather";
  std::int64_t number = 0;
  for (const GatherItem& item : p.items) {
    const Device device = p.items.front().src.device;
    require(item_size(item.src.dtype) > 0, op, ": tensor ", number, " has an unsupported dtype");
    require_device(op, "a tensor", item.src, device);
    require_matrix(op, "a tensor", item.src);
    require(item.dim >= 0 && item.dim < item.src.ndim, op, ": dim is ", item.dim, " for tensor ",
            number, " of shape ", ShapeOf{item.src});
    require(item.index.ndim == 1, op, ": index ", number, " must have 1 dimension, not ",
            ShapeOf{item.index});
    require_buffer(op, "an index", item.index, DType::i64, 0, Device{});
    const std::int64_t length = item.src.shape[item.dim], kept = item.index.shape[0];
    std::int64_t previous = -1;
    for (std::int64_t i = 0; i < kept; ++i) {
      const std::int64_t now = item.index.as<std::int64_t>()[i];
      require(now > previous, op, ": index ", number, " must be ascending and non-negative, but ",
              now, " follows ", previous);
      previous = now;
    }
    require(previous < length, op, ": index ", number, " reaches ", previous, ", beyond dimension ",
            item.dim, " of shape ", ShapeOf{item.src});
    require_dtype(op, "a result", item.dst, item.src.dtype);
    require_device(op, "a result", item.dst, device);
    bool fits = item.dst.ndim == item.src.ndim && item.dst.contiguous();
    for (int d = 0; fits && d < item.src.ndim; ++d)
      fits = item.dst.shape[d] == (d == item.dim ? kept : item.src.shape[d]);
    require(fits, op, ": result ", number, " has shape ", ShapeOf{item.dst},
            ", which does not hold ", kept, " entries along dimension ", item.dim, " of ",
            ShapeOf{item.src});
    ++number;
  }
}

void check(const ScanParams& p) {
  constexpr const char* op = "scan";
  const Device device = p.out.device;
  for (const Tensor& t : p.tensors) {
    require_float(op, "x", t);
    require_device(op, "x", t, device);
    require(t.dense(), op, ": x must fill one block of memory, unlike this view of shape ",
            ShapeOf{t});
  }
  require_buffer(op, "out", p.out, DType::f64, kScanFields * std::int64_t(p.tensors.size()),
                 device);
  require_buffer(op, "workspace", p.workspace, DType::u8, 0, device);
}

void check(const AdamWParams& p) {
  constexpr const char* op = "adamw";
  const Device device = p.buffers.total.device;
  const std::int64_t slots = p.buffers.steps.numel();
  std::int64_t number = 0;
  for (const AdamWItem& item : p.items) {
    const auto require_like_w = [&](const char* arg, const Tensor& t) {
      require(t.device == device, op, ": ", arg, " of parameter ", number, " is on ", t.device,
              ", expected ", device);
      require(t.same_layout(item.w), op, ": ", arg, " of parameter ", number, " has shape ",
              ShapeOf{t}, " or strides unlike the parameter's ", ShapeOf{item.w});
    };
    const auto require_f32 = [&](const char* arg, const Tensor& t) {
      require(t.dtype == DType::f32, op, ": ", arg, " of parameter ", number,
              " must be float32, not ", name(t.dtype));
      require_like_w(arg, t);
    };
    require(is_float(item.w), op, ": parameter ", number,
            " must be float32, bfloat16 or float16, not ", name(item.w.dtype));
    require(item.w.dense(), op, ": parameter ", number, " of shape ", ShapeOf{item.w},
            " must fill one block of memory");
    require(is_float(item.g), op, ": the gradient of parameter ", number,
            " must be float32, bfloat16 or float16, not ", name(item.g.dtype));
    require_like_w("w", item.w);
    require_like_w("the gradient", item.g);
    require_f32("exp_avg", item.m);
    require_f32("exp_avg_sq", item.v);
    require(item.master.present() == (p.rule.master == Master::fp32 && item.w.dtype != DType::f32),
            op, ": parameter ", number, item.master.present() ? " needs no" : " needs a",
            " master copy");
    if (item.master.present()) require_f32("the master copy", item.master);
    require(item.group >= 0 && item.group < int(p.groups.size()), op, ": parameter ", number,
            " is in group ", item.group, " of ", p.groups.size());
    require(item.slot >= 0 && item.slot < slots, op, ": parameter ", number, " has slot ",
            item.slot, " of ", slots);
    ++number;
  }
  require_buffer(op, "steps", p.buffers.steps, DType::i64, 0, device);
  require_buffer(op, "stats", p.buffers.stats, DType::f64, 2 * slots, device);
  require_buffer(op, "total", p.buffers.total, DType::f64, 2, device);
  require_buffer(op, "control", p.buffers.control, DType::f64, kControlFields, device);
  require_buffer(op, "workspace", p.buffers.workspace, DType::u8, 0, device);
}

void check(const CrossEntropyParams& p) {
  constexpr const char* op = "cross_entropy";
  const Device device = p.logits.device;
  require_float(op, "logits", p.logits);
  require(p.logits.ndim == 2, op, ": logits must have 2 dimensions, not ", ShapeOf{p.logits});
  require_matrix(op, "logits", p.logits);
  const std::int64_t rows = p.logits.rows();
  require(!p.scale || rows <= 1 || p.logits.row_stride() >= p.logits.cols(), op,
          ": rows of logits overlap, so they cannot be overwritten");
  require_buffer(op, "targets", p.targets, DType::i64, rows, device);
  require_buffer(op, "loss", p.loss, DType::f32, rows, device);
  require_buffer(op, "log_normaliser", p.log_normaliser, DType::f32, rows, device);
}

void check(const AttentionParams& p) {
  constexpr const char* op = "attention";
  const auto require_heads = [&](const char* arg, const Tensor& t) {
    require_dtype(op, arg, t, DType::bf16);
    require_device(op, arg, t, p.q.device);
    require(t.ndim == 4, op, ": ", arg, " must have 4 dimensions, not ", ShapeOf{t});
    require(t.shape[3] <= 1 || t.strides[3] == 1, op, ": ", arg, " must have inner stride 1");
  };
  const auto require_like = [&](const char* arg, const Tensor& t, const char* other_arg,
                                const Tensor& other) {
    require_heads(arg, t);
    require_same_shape(op, arg, t, other_arg, other);
  };
  require_heads("q", p.q);
  require_heads("k", p.k);
  require_like("v", p.v, "k", p.k);
  require(p.q.shape[3] % 16 == 0 && p.q.shape[3] > 0 && p.q.shape[3] <= kMaxHeadDim, op,
          ": the heads' dimension must be a multiple of 16 up to ", kMaxHeadDim, ", not ",
          p.q.shape[3]);
  require(p.k.shape[0] == p.q.shape[0] && p.k.shape[2] == p.q.shape[2] &&
              p.k.shape[3] == p.q.shape[3] && p.k.shape[1] > 0 && p.q.shape[1] % p.k.shape[1] == 0,
          op, ": k of shape ", ShapeOf{p.k}, " does not go with q of shape ", ShapeOf{p.q});
  require(p.scale > 0, op, ": scale must be positive, not ", p.scale);
  require_like("out", p.out, "q", p.q);
  require_buffer(op, "log_sums", p.log_sums, DType::f32, p.q.shape[0] * p.q.shape[1] * p.q.shape[2],
                 p.q.device);
  if (!p.grad_out.present()) return;
  require_like("grad_out", p.grad_out, "q", p.q);
  require_like("grad_q", p.grad_q, "q", p.q);
  require_like("grad_k", p.grad_k, "k", p.k);
  require_like("grad_v", p.grad_v, "k", p.k);
}

}  // namespace fastprune
