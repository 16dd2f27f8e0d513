// One launch over many tensors: a table of records travels in the kernel's argument area (32 KB
// since CUDA 12.1 on sm_70 and later), and each block finds its record there by bisection.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "cuda/launch.cuh"

namespace fastprune::cuda {

constexpr std::int64_t kArgumentBytes = 32764;

// Room is left for eight further arguments of 8 bytes.
template <class Record>
struct Table {
  static constexpr int kCapacity =
      static_cast<int>((kArgumentBytes - 128) / (sizeof(Record) + sizeof(std::int32_t)));

  std::int32_t count = 0;
  std::int32_t end[kCapacity];  // blocks up to and including each record
  Record records[kCapacity];
};

// The record of a block, and the block's place among the blocks of that record.
struct Place {
  int record;
  int block;
};

template <class Record>
__device__ __forceinline__ Place find_place(const Table<Record>& table, int block) {
  int low = 0;
  int high = table.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (block < table.end[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {low, low > 0 ? block - table.end[low - 1] : block};
}

// Fills tables and hands each full one, and at finish() the last, to flush(table, blocks).
template <class Record>
class TableBuilder {
 public:
  using Flush = std::function<void(const Table<Record>&, std::int64_t)>;

  explicit TableBuilder(Flush flush) : flush_(std::move(flush)) {}

  void add(const Record& record, std::int64_t blocks) {
    if (blocks == 0) return;
    if (blocks > kMaxBlocks) throw std::runtime_error("a tensor is too large for one launch");
    if (table_.count == Table<Record>::kCapacity || blocks_ + blocks > kMaxBlocks) finish();
    blocks_ += blocks;
    table_.end[table_.count] = static_cast<std::int32_t>(blocks_);
    table_.records[table_.count] = record;
    ++table_.count;
  }

  void finish() {
    if (table_.count > 0) flush_(table_, blocks_);
    table_.count = 0;
    blocks_ = 0;
  }

 private:
  static constexpr std::int64_t kMaxBlocks = 0x7fffffff;

  Flush flush_;
  Table<Record> table_{};
  std::int64_t blocks_ = 0;
};

}  // namespace fastprune::cuda
