// A borrowed view of a tensor: nothing here owns memory or knows Python or torch.
#pragma once

#include <cstdint>

namespace fastprune {

enum class DType : std::uint8_t { f32, bf16, f16, f64, i64, i32, i16, i8, u8, other };
enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
  bool operator!=(const Device& o) const { return !(*this == o); }
};

// Bytes of one element; `other` covers every dtype no op computes with.
inline int item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16:
      return 2;
    case DType::i8:
    case DType::u8:
      return 1;
    case DType::other:
      break;
  }
  return 0;
}

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64";
    case DType::i64:
      return "int64";
    case DType::i32:
      return "int32";
    case DType::i16:
      return "int16";
    case DType::i8:
      return "int8";
    case DType::u8:
      return "uint8";
    case DType::other:
      break;
  }
  return "an unsupported dtype";
}

// More elements than any address space has bytes. Sizes computed from fewer fit in 64 bits.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;

// shape and strides (in elements) point into the owner's metadata, so a view lives no longer
// than the call that borrowed it. A default view is an absent (optional) tensor.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::other;
  Device device;
  int ndim = -1;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;

  bool present() const { return ndim >= 0; }

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }

  // The lengths' product, with 1 in place of 0, is at most kMaxElements: numel() cannot overflow,
  // nor can what is computed from some of the lengths.
  bool countable() const {
    std::int64_t n = 1;
    for (int d = 0; d < ndim; ++d)
      if (shape[d] != 0 && (__builtin_mul_overflow(n, shape[d], &n) || n > kMaxElements))
        return false;
    return true;
  }

  // The first element lies at a multiple of `bytes`, a power of two (or 0, which asks for nothing).
  bool aligned(int bytes) const {
    return bytes == 0 || reinterpret_cast<std::uintptr_t>(data) % std::uintptr_t(bytes) == 0;
  }

  bool contiguous() const {
    std::int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] == 0) return true;
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }

  // The elements fill one gapless block of memory, in whatever order of dimensions, and none shares
  // its place with another.
  bool dense() const {
    const std::int64_t n = numel();
    for (std::int64_t filled = 1; filled < n;) {
      int d = 0;
      while (d < ndim && (shape[d] == 1 || strides[d] != filled)) ++d;
      if (d == ndim) return false;
      filled *= shape[d];
    }
    return true;
  }

  // Same shape, and the elements lie in the same order (strides of length-1 dimensions are free).
  bool same_layout(const Tensor& o) const {
    if (ndim != o.ndim) return false;
    for (int d = 0; d < ndim; ++d) {
      if (shape[d] != o.shape[d]) return false;
      if (shape[d] > 1 && strides[d] != o.strides[d]) return false;
    }
    return true;
  }

  // Matrix view: (n,) counts as (n, 1).
  std::int64_t rows() const { return ndim > 0 ? shape[0] : 1; }
  std::int64_t cols() const { return ndim > 1 ? shape[1] : 1; }
  std::int64_t row_stride() const { return ndim > 0 ? strides[0] : 1; }
  std::int64_t col_stride() const { return ndim > 1 ? strides[1] : 1; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace fastprune
