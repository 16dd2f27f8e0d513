// From a dtype at run time to a C++ type at compile time, in one place.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace fastprune {

// Storage types of half precision; their arithmetic is float (math.h converts).
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}), f(Type<bf16>{}) or f(Type<f16>{}). The op's check has refused the rest.
template <class F>
inline void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<f16>{});
    default:
      return;
  }
}

}  // namespace fastprune
