// torch_parallel_for on plain threads. ThreadSanitizer sees how these wait for each other, which it
// does not of OpenMP's, so that what it reports of the kernels' loops on them is true.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" std::int32_t parallel_for(std::int64_t begin, std::int64_t end, std::int64_t,
                                     void (*body)(std::int64_t, std::int64_t, void*),
                                     void* context) {
  constexpr std::int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (std::int64_t t = 0; t < kThreads; ++t)
    threads.emplace_back(body, begin + (end - begin) * t / kThreads,
                         begin + (end - begin) * (t + 1) / kThreads, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
