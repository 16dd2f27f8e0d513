// Parallel loops on a borrowed thread pool: this module brings no threads and no OpenMP of its own.
#pragma once

#include <cstdint>

namespace fastprune::cpu {

// torch_parallel_for of libtorch_cpu (torch/csrc/stable/c/shim.h): splits [begin, end) over the
// pool's threads and calls body(first, last, context) for each part.
using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = std::int32_t (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                                     Body body, void* context);

// nullptr: run on the calling thread.
void set_parallel_for(ParallelFor function);
ParallelFor parallel_for();

// f(i) for every i in [0, n). What f(i) computes must not depend on which thread runs it. It must
// not throw. Work on too few bytes to be worth waking a thread stays on the calling one.
constexpr std::int64_t kWorthThreads = 256 * 1024;

template <class F>
void for_each_task(std::int64_t n, std::int64_t bytes, const F& f) {
  const Body body = [](std::int64_t begin, std::int64_t end, void* context) {
    const F& task = *static_cast<const F*>(context);
    for (std::int64_t i = begin; i < end; ++i) task(i);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&f));
  const bool alone = n < 2 || bytes < kWorthThreads || !parallel_for();
  if (alone || parallel_for()(0, n, 1, body, context) != 0) body(0, n, context);
}

}  // namespace fastprune::cpu
