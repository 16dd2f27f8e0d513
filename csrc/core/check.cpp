// The one check of each op's arguments.
#include "core/check.h"

#include <algorithm>
#include <string>

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

void require_heads(const char* arg, const Tensor& t, Device device) {
  constexpr const char* op = "attention";
  require_dtype(op, arg, t, DType::bf16);
  require_device(op, arg, t, device);
  require(t.ndim == 4, op, ": ", arg, " must have 4 dimensions, not ", ShapeOf{t});
  require(t.shape[3] <= 1 || t.strides[3] == 1, op, ": ", arg, " must have inner stride 1");
}

}  // namespace

void Memory::add(const char* arg, const Tensor& t, std::int64_t number, bool written) {
  if (!t.present() || t.numel() == 0) return;
  std::int64_t length = 1;
  for (int d = 0; d < t.ndim; ++d) length += (t.shape[d] - 1) * t.strides[d];
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data);
  extents_.push_back(
      {begin, begin + std::uintptr_t(length * item_size(t.dtype)), arg, number, written});
}

void Memory::require_apart() {
  const auto named = [](const Extent& e) {
    return e.number < 0 ? std::string(e.arg) : e.arg + (" " + std::to_string(e.number));
  };
  std::sort(extents_.begin(), extents_.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* furthest[2] = {nullptr, nullptr};  // read and written, so far
  for (const Extent& e : extents_) {
    for (const Extent* other : furthest)
      if (other && e.begin < other->end && (e.written || other->written))
        require(false, op_, ": ", named(e), " and ", named(*other),
                " share memory, and one is written");
    const Extent*& last = furthest[e.written];
    if (!last || last->end < e.end) last = &e;
  }
}

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
  require_workspace(op, p.workspace, device);
  Memory memory(op);
  memory.reads("w", p.w);
  memory.reads("g", p.g);
  memory.reads("h", p.h);
  memory.reads("x", p.x);
  memory.writes("rows", p.rows);
  memory.writes("cols", p.cols);
  memory.writes("workspace", p.workspace);
  memory.require_apart();
}

void check(const GatherParams& p) {
  constexpr const char* op = "gather";
  Memory memory(op);
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
    memory.reads("tensor", item.src, number);
    memory.reads("index", item.index, number);
    memory.writes("result", item.dst, number);
    ++number;
  }
  if (p.workspace.present() && number > 0) {
    require_workspace(op, p.workspace, p.items.front().src.device);
    memory.writes("workspace", p.workspace);
  }
  memory.require_apart();
}

void check(const ScanParams& p) {
  constexpr const char* op = "scan";
  const Device device = p.out.device;
  Memory memory(op);
  for (const Tensor& t : p.tensors) {
    require_float(op, "x", t);
    require_device(op, "x", t, device);
    require(t.dense(), op, ": x must fill one block of memory, unlike this view of shape ",
            ShapeOf{t});
    memory.reads("x", t);
  }
  require_buffer(op, "out", p.out, DType::f64, kScanFields * std::int64_t(p.tensors.size()),
                 device);
  require_workspace(op, p.workspace, device);
  memory.writes("out", p.out);
  memory.writes("workspace", p.workspace);
  memory.require_apart();
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
  require_workspace(op, p.buffers.workspace, device);
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
  Memory memory(op);
  p.scale ? memory.writes("logits", p.logits) : memory.reads("logits", p.logits);
  memory.reads("targets", p.targets);
  memory.writes("loss", p.loss);
  memory.writes("log_normaliser", p.log_normaliser);
  memory.require_apart();
}

void check_attention_query(const Tensor& q) {
  require_heads("q", q, q.device);
  require(q.numel() > 0, "attention: q must not be empty, unlike ", ShapeOf{q});
  require(q.shape[3] % 16 == 0 && q.shape[3] <= kMaxHeadDim,
          "attention: the heads' dimension must be a multiple of 16 up to ", kMaxHeadDim, ", not ",
          q.shape[3]);
}

void check_attention_key(const Tensor& q, const Tensor& k) {
  require_heads("k", k, q.device);
  require(k.shape[0] == q.shape[0] && k.shape[2] == q.shape[2] && k.shape[3] == q.shape[3] &&
              k.shape[1] > 0 && q.shape[1] % k.shape[1] == 0,
          "attention: k of shape ", ShapeOf{k}, " does not go with q of shape ", ShapeOf{q});
}

void check(const AttentionParams& p) {
  constexpr const char* op = "attention";
  const bool backward = p.grad_out.present();
  Memory memory(op);
  const auto require_like = [&](const char* arg, const Tensor& t, const char* other_arg,
                                const Tensor& other) {
    require_heads(arg, t, p.q.device);
    require_same_shape(op, arg, t, other_arg, other);
  };
  const auto require_input = [&](const char* arg, const Tensor& t, const char* other_arg,
                                 const Tensor& other) {
    require_like(arg, t, other_arg, other);
    memory.reads(arg, t);
  };
  const auto require_result = [&](const char* arg, const Tensor& t, const char* other_arg,
                                  const Tensor& other) {
    require_like(arg, t, other_arg, other);
    require(t.dense(), op, ": ", arg, " must fill one block of memory, unlike this view of shape ",
            ShapeOf{t});
    memory.writes(arg, t);
  };
  check_attention_query(p.q);
  check_attention_key(p.q, p.k);
  memory.reads("q", p.q);
  memory.reads("k", p.k);
  require_input("v", p.v, "k", p.k);
  require(p.scale > 0, op, ": scale must be positive, not ", p.scale);
  backward ? require_input("out", p.out, "q", p.q) : require_result("out", p.out, "q", p.q);
  require_buffer(op, "log_sums", p.log_sums, DType::f32, p.q.shape[0] * p.q.shape[1] * p.q.shape[2],
                 p.q.device);
  backward ? memory.reads("log_sums", p.log_sums) : memory.writes("log_sums", p.log_sums);
  if (backward) {
    require_input("grad_out", p.grad_out, "q", p.q);
    require_result("grad_q", p.grad_q, "q", p.q);
    require_result("grad_k", p.grad_k, "k", p.k);
    require_result("grad_v", p.grad_v, "k", p.k);
  }
  require_workspace(op, p.workspace, p.q.device);
  memory.writes("workspace", p.workspace);
  memory.require_apart();
}

}  // namespace fastprune
