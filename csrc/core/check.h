// Conditions on arguments. A broken one throws std::invalid_argument (ValueError in Python)
// whose message names the op, the argument and what it was.
#pragma once

#include <sstream>
#include <stdexcept>

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

inline void require_float(const char* op, const char* arg, const Tensor& t) {
  require(is_float(t), op, ": ", arg, " must be float32, bfloat16 or float16, not ", name(t.dtype));
}

inline void require_dtype(const char* op, const char* arg, const Tensor& t, DType dtype) {
  require(t.dtype == dtype, op, ": ", arg, " must be ", name(dtype), ", not ", name(t.dtype));
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

}  // namespace fastprune
