// Conditions on arguments. A broken one throws std::invalid_argument (ValueError in Python)
// whose message names the op, the argument and what it was.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "core/tensor.h"

namespace fastprune {

// How a device and a shape are written in messages. These are what `require` formats, so that a
// check that passes formats nothing.
inline std::ostream& operator<<(std::ostream& to, Device device) {
  if (device.type == DeviceType::cpu) return to << "cpu";
  return to << "cuda:" << device.index;
}

struct ShapeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& to, ShapeOf shape) {
  const Tensor& t = shape.tensor;
  to << "(";
  for (int d = 0; d < t.ndim; ++d) to << (d ? ", " : "") << t.shape[d];
  return to << (t.ndim == 1 ? ",)" : ")");
}

// The parts are only formatted when the condition is broken.
template <class... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline bool is_float(const Tensor& t) {
  return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16;
}

// What a tensor is in a message about its dtype.
inline const char* kind_of(const Tensor& t) { return t.present() ? name(t.dtype) : "None"; }

inline void require_float(const char* op, const char* arg, const Tensor& t) {
  require(is_float(t), op, ": ", arg, " must be float32, bfloat16 or float16, not ", kind_of(t));
}

inline void require_dtype(const char* op, const char* arg, const Tensor& t, DType dtype) {
  require(t.dtype == dtype, op, ": ", arg, " must be ", name(dtype), ", not ", kind_of(t));
}

inline void require_device(const char* op, const char* arg, const Tensor& t, Device device) {
  require(t.device == device, op, ": ", arg, " is on ", t.device, ", expected ", device);
}

inline void require_same_shape(const char* op, const char* arg, const Tensor& t,
                               const char* other_arg, const Tensor& other) {
  bool same = t.ndim == other.ndim;
  for (int d = 0; same && d < t.ndim; ++d) same = t.shape[d] == other.shape[d];
  require(same, op, ": ", arg, " has shape ", ShapeOf{t}, ", ", other_arg, " has ", ShapeOf{other});
}

// A contiguous buffer with room for `numel` elements.
inline void require_buffer(const char* op, const char* arg, const Tensor& t, DType dtype,
                           std::int64_t numel, Device device) {
  require_dtype(op, arg, t, dtype);
  require_device(op, arg, t, device);
  require(t.contiguous() && t.numel() >= numel, op, ": ", arg, " must be contiguous with at least ",
          numel, " elements, not ", ShapeOf{t});
}

// Bytes in which a backend keeps what it likes; how many it needs it checks itself.
constexpr int kWorkspaceAlignment = 64;

inline void require_workspace(const char* op, const Tensor& t, Device device) {
  require_buffer(op, "workspace", t, DType::u8, 0, device);
  require(t.aligned(kWorkspaceAlignment), op, ": workspace must begin at a multiple of ",
          kWorkspaceAlignment, " bytes");
}

// The memory that an op reads and writes. What it writes must lie apart from all the rest.
class Memory {
 public:
  explicit Memory(const char* op) : op_(op) {}

  // `number` is that of a tensor in a list.
  void reads(const char* arg, const Tensor& t, std::int64_t number = -1) {
    add(arg, t, number, false);
  }
  void writes(const char* arg, const Tensor& t, std::int64_t number = -1) {
    add(arg, t, number, true);
  }
  void require_apart();

 private:
  struct Extent {
    std::uintptr_t begin, end;
    const char* arg;
    std::int64_t number;
    bool written;
  };

  void add(const char* arg, const Tensor& t, std::int64_t number, bool written);

  const char* op_;
  std::vector<Extent> extents_;
};

}  // namespace fastprune
