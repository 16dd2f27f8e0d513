// One sweep over all tensors for counts, extremes and moments; a second one over those chunks
// whose extremes lie beyond 6 sigma of their tensor.
#include <cmath>

#include "core/check.h"
#include "cpu/chunks.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {

const void* at(const Tensor& t, std::int64_t i) {
  return t.as<const char>() + i * item_size(t.dtype);
}

// The chunks of one tensor, in order.
ScanPart combine(const ScanPart* parts, std::int64_t n) {
  ScanPart all{0, 0, 0, INFINITY, -INFINITY, 0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    all.nan += parts[i].nan;
    all.inf += parts[i].inf;
    all.zeros += parts[i].zeros;
    all.min = std::fmin(all.min, parts[i].min);
    all.max = std::fmax(all.max, parts[i].max);
    all.sum += parts[i].sum;
    all.squares += parts[i].squares;
  }
  return all;
}

void write(const ScanPart& part, double numel, double* out) {
  out[kScanNan] = part.nan;
  out[kScanInf] = part.inf;
  out[kScanZeros] = part.zeros;
  out[kScanMin] = part.min;
  out[kScanMax] = part.max;
  out[kScanNumel] = numel;
  finish_scan_row(part.sum, part.squares, out);
}

}  // namespace

std::int64_t scan_workspace(const std::vector<Tensor>& tensors) {
  std::int64_t chunks = 0;
  for (const Tensor& t : tensors) chunks += chunks_of(t.numel());
  return chunks * std::int64_t(sizeof(ScanPart));
}

void scan(const ScanParams& p) {
  check(p);
  require(p.workspace.numel() >= scan_workspace(p.tensors), "scan: workspace is too small");
  Chunks chunks;
  for (const Tensor& t : p.tensors) chunks.add(t.numel());
  ScanPart* parts = p.workspace.as<ScanPart>();
  double* out = p.out.as<double>();
  const Level& loops = level();
  for_each_task(chunks.count(), bytes_of(chunks), [&](std::int64_t i) {
    const Chunks::Place place = chunks[i];
    const Tensor& t = p.tensors[place.tensor];
    parts[i] = loops.scan_chunk(t.dtype, at(t, place.begin), place.n);
  });

  std::vector<std::int64_t> again;  // chunks that reach beyond their tensor's limit
  for (std::size_t t = 0; t < p.tensors.size(); ++t) {
    const std::int64_t first = chunks.first(t);
    double* row = out + t * kScanFields;
    write(combine(parts + first, chunks.first(t + 1) - first), double(p.tensors[t].numel()), row);
    const double limit = outlier_limit(row), mean = row[kScanMean];
    for (std::int64_t i = first; i < chunks.first(t + 1); ++i)
      if (parts[i].max - mean > limit || mean - parts[i].min > limit) again.push_back(i);
  }

  std::vector<std::int64_t> counts(again.size());
  const std::int64_t bytes = std::int64_t(again.size()) * kChunk * 2;
  for_each_task(std::int64_t(again.size()), bytes, [&](std::int64_t i) {
    const Chunks::Place place = chunks[again[std::size_t(i)]];
    const Tensor& t = p.tensors[place.tensor];
    const double* row = out + place.tensor * kScanFields;
    counts[std::size_t(i)] = loops.count_outliers(t.dtype, at(t, place.begin), place.n,
                                                  float(row[kScanMean]), float(outlier_limit(row)));
  });
  for (std::size_t i = 0; i < again.size(); ++i)
    out[chunks[again[i]].tensor * kScanFields + kScanOutliers] += double(counts[i]);
}

}  // namespace fastprune::cpu
