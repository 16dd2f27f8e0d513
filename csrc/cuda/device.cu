// Whether this machine has a device that the compiled kernels run on. Asking creates no context,
// so it costs no device memory.
#include "core/ops.h"
#include "cuda/launch.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kOldestMajor = 8;  // the first architecture the module is compiled for is sm_80

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

std::string unavailable_reason() {
  int driver = 0;
  int runtime = 0;
  int devices = 0;
  int major = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  static_cast<void>(cudaRuntimeGetVersion(&runtime));
  if (driver == 0) return "no NVIDIA driver is installed";
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0)
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  static_cast<void>(cudaGetLastError());
  if (status == cudaErrorInsufficientDriver)
    return "the driver supports CUDA " + version(driver) + ", the kernels were built with " +
           version(runtime);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (devices == 0) return "no CUDA device is visible";
  if (major < kOldestMajor)
    return "the device has compute capability " + std::to_string(major) +
           ".x, the kernels need 8.0 or later";
  return "";
}

}  // namespace fastprune::cuda
