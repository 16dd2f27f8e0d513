// One parallel loop over blocks of output rows of all tensors. Kept rows are copied as runs of
// adjacent rows; kept columns are picked by a shuffle plan made once per tensor.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "core/check.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {

constexpr std::int64_t kTaskBytes = 256 * 1024;
constexpr std::int64_t kAheadBytes = 6 * 1024;  // of outputs between asking for data and use
// Smaller results may stay in the caches for their reader.
constexpr std::int64_t kWorthStreaming = 4 * 1024 * 1024;
constexpr std::int64_t kWorthLargePages = 8 * 1024 * 1024;

struct ColumnPlan {
  ColumnGather gather{};
  std::vector<std::int64_t> base, ahead;
  std::vector<std::uint16_t> picks;
};

// Elements of 8 bytes are moved as two of 4.
std::vector<std::int64_t> as_pairs(const std::int64_t* index, std::int64_t kept) {
  std::vector<std::int64_t> pairs;
  pairs.reserve(std::size_t(2 * kept));
  for (std::int64_t i = 0; i < kept; ++i) {
    pairs.push_back(2 * index[i]);
    pairs.push_back(2 * index[i] + 1);
  }
  return pairs;
}

// `kept` of the `in` columns of rows `stride` apart, for blocks of `lanes` outputs.
void plan_blocks(ColumnPlan& plan, std::int64_t lanes, std::int64_t in, std::int64_t stride) {
  ColumnGather& gather = plan.gather;
  const std::int64_t* index = gather.index;
  gather.blocks = (gather.kept + lanes - 1) / lanes;
  // The last block ends with the row: it may repeat outputs, and needs no tail.
  const auto first = [&](std::int64_t block) {
    return block + 1 < gather.blocks ? block * lanes : gather.kept - lanes;
  };
  const std::int64_t later = kAheadBytes / level().vector_bytes;
  for (std::int64_t b = 0; b < gather.blocks; ++b) {
    const std::int64_t low = index[first(b)], high = index[first(b) + lanes - 1];
    std::int64_t base = low + 2 * lanes <= in ? low : in - 2 * lanes;
    if (high - base >= 2 * lanes) base = -1;
    plan.base.push_back(base);
    plan.ahead.push_back(index[first((b + later) % gather.blocks)] +
                         (b + later) / gather.blocks * stride);
    for (std::int64_t i = 0; i < lanes; ++i)
      plan.picks.push_back(base < 0 ? std::uint16_t(0) : std::uint16_t(index[first(b) + i] - base));
  }
  gather.base = plan.base.data();
  gather.ahead = plan.ahead.data();
  gather.picks = plan.picks.data();
}

// What one tensor needs, ready for any thread.
struct Job {
  const char* src = nullptr;
  char* dst = nullptr;
  std::int64_t rows = 0, src_stride = 0, row_bytes = 0;  // of the output; stride in bytes
  const std::int64_t* index = nullptr;                   // kept rows, or kept columns
  int item = 0;                                          // bytes of one element
  bool columns = false, shuffled = false, stream = false;
  std::vector<std::int64_t> pairs;
  ColumnPlan plan;
  std::int64_t rows_per_task = 1, first_task = 0;
};

void prepare_columns(Job& job, const GatherItem& entry) {
  std::int64_t kept = entry.index.shape[0], in = entry.src.shape[1];
  if (job.item == 8) {
    job.pairs = as_pairs(job.index, kept);
    job.index = job.pairs.data();
    job.item = 4;
    kept *= 2;
    in *= 2;
  }
  job.plan.gather.item_size = job.item;
  job.plan.gather.kept = kept;
  job.plan.gather.index = job.index;
  const std::int64_t lanes = level().vector_bytes / job.item;
  job.shuffled = job.item != 1 && kept >= lanes && in >= 2 * lanes;
  if (!job.shuffled) return;
  plan_blocks(job.plan, lanes, in, job.src_stride / job.item);
}

void prepare(Job& job, const GatherItem& entry) {
  job.item = item_size(entry.src.dtype);
  job.src = entry.src.as<const char>();
  job.dst = entry.dst.as<char>();
  job.rows = entry.dst.rows();
  job.src_stride = entry.src.row_stride() * job.item;
  job.row_bytes = entry.dst.cols() * job.item;
  job.index = entry.index.as<const std::int64_t>();
  job.columns = entry.dim == 1;
  if (job.columns) prepare_columns(job, entry);
  job.rows_per_task = job.row_bytes > 0 ? kTaskBytes / job.row_bytes : 0;
  if (job.rows_per_task < 1) job.rows_per_task = 1;
}

// A new result costs a page fault for each page, more than the copy itself: ask for large pages.
// The first touch zeroes such a page in the caches, so that streaming past them would not pay.
// Returns whether that was done.
bool ask_for_large_pages(const Job& job) {
#if defined(__linux__)
  constexpr std::uintptr_t large = 2 * 1024 * 1024;
  const auto begin = reinterpret_cast<std::uintptr_t>(job.dst);
  const std::uintptr_t end = (begin + std::uintptr_t(job.rows * job.row_bytes)) / large * large;
  const std::uintptr_t first = (begin + large - 1) / large * large;
  if (job.rows * job.row_bytes < kWorthLargePages) return false;
  return madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  static_cast<void>(job);
  return false;
#endif
}

void copy_rows(const Job& job, std::int64_t begin, std::int64_t end) {
  const Level& loops = level();
  const bool adjacent = job.src_stride == job.row_bytes;
  for (std::int64_t r = begin; r < end;) {
    std::int64_t run = 1;
    while (adjacent && r + run < end && job.index[r + run] == job.index[r] + run) ++run;
    loops.copy(job.dst + r * job.row_bytes, job.src + job.index[r] * job.src_stride,
               run * job.row_bytes, job.stream);
    r += run;
  }
}

void copy_columns(const Job& job, std::int64_t begin, std::int64_t end) {
  const char* from = job.src + begin * job.src_stride;
  char* to = job.dst + begin * job.row_bytes;
  if (job.shuffled)
    return level().gather_columns(job.plan.gather, from, job.src_stride / job.item, to, end - begin,
                                  job.stream);
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t i = 0; i < job.plan.gather.kept; ++i)
      std::memcpy(to + i * job.item, from + job.index[i] * job.item, std::size_t(job.item));
    from += job.src_stride;
    to += job.row_bytes;
  }
}

}  // namespace

void gather(const GatherParams& p) {
  check(p);
  std::vector<Job> jobs;
  jobs.reserve(p.items.size());
  std::int64_t tasks = 0, bytes = 0;
  for (const GatherItem& entry : p.items) {
    if (entry.dst.numel() == 0) continue;
    Job& job = jobs.emplace_back();
    prepare(job, entry);
    job.first_task = tasks;
    bytes += job.rows * job.row_bytes;
    tasks += (job.rows + job.rows_per_task - 1) / job.rows_per_task;
  }
  for (Job& job : jobs)
    job.stream = !(p.fresh && ask_for_large_pages(job)) && bytes >= kWorthStreaming;
  for_each_task(tasks, bytes, [&](std::int64_t task) {
    std::size_t low = 0, high = jobs.size();  // the last job that starts at or before the task
    while (high - low > 1) {
      const std::size_t middle = (low + high) / 2;
      (jobs[middle].first_task <= task ? low : high) = middle;
    }
    const Job& job = jobs[low];
    const std::int64_t begin = (task - job.first_task) * job.rows_per_task;
    const std::int64_t left = job.rows - begin;
    const std::int64_t end = begin + (left < job.rows_per_task ? left : job.rows_per_task);
    job.columns ? copy_columns(job, begin, end) : copy_rows(job, begin, end);
    if (job.stream) level().settle();
  });
}

}  // namespace fastprune::cpu
