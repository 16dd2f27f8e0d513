// A list of tensors as one sequence of chunks of fixed length, so that the split does not depend
// on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune::cpu {

constexpr std::int64_t kChunk = 32 * 1024;  // elements; divides 2^32 (random_key)

inline std::int64_t chunks_of(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

class Chunks {
 public:
  // Where a chunk lies: tensor number, first element, number of elements.
  struct Place {
    std::size_t tensor;
    std::int64_t begin, n;
  };

  void add(std::int64_t numel) {
    numel_.push_back(numel);
    elements_ += numel;
    first_.push_back(first_.back() + chunks_of(numel));
  }
  std::int64_t count() const { return first_.back(); }
  std::int64_t elements() const { return elements_; }
  // Chunks [first(t), first(t + 1)) belong to tensor t.
  std::int64_t first(std::size_t tensor) const { return first_[tensor]; }

  Place operator[](std::int64_t chunk) const {
    std::size_t low = 0, high = numel_.size();
    while (high - low > 1) {
      const std::size_t middle = (low + high) / 2;
      (first_[middle] <= chunk ? low : high) = middle;
    }
    const std::int64_t begin = (chunk - first_[low]) * kChunk;
    const std::int64_t left = numel_[low] - begin;
    return {low, begin, left < kChunk ? left : kChunk};
  }

 private:
  std::vector<std::int64_t> numel_, first_{0};
  std::int64_t elements_ = 0;
};

// Bytes that a pass over the chunks reads at the least.
inline std::int64_t bytes_of(const Chunks& chunks) { return 2 * chunks.elements(); }

}  // namespace fastprune::cpu
