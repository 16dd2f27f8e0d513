// From the host to the device: checked calls, the device guard, the kernel launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/tensor.h"

namespace fastprune::cuda {

constexpr int kWarp = 32;

// The runtime also remembers a failed call; it is cleared here, since the exception reports it
// and whoever uses the runtime next must not find it.
inline void succeed(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device the current one and puts the former back.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    succeed(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device.index) succeed(cudaSetDevice(device.index), "cudaSetDevice");
    changed_ = former_ != device.index;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(former_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

template <class T>
struct Exactly {
  using type = T;
};

// Every launch goes through here: a grid of one dimension, none for no work, and the status of
// the launch itself, which a machine without a usable driver would otherwise lose.
template <class... Params>
inline void launch(const char* what, void (*kernel)(Params...), std::int64_t blocks, int threads,
                   cudaStream_t stream, const typename Exactly<Params>::type&... args) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error(std::string(what) + ": the tensors are too large for one launch");
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  succeed(
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), pointers, 0, stream),
      what);
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Parts of a workspace begin at multiples of 256 bytes, as the allocator's blocks do.
constexpr std::int64_t aligned_bytes(std::int64_t bytes) { return ceil_div(bytes, 256) * 256; }

}  // namespace fastprune::cuda
