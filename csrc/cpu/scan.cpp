// One sweep over all tensors for counts, extremes and moments; a second one over those tensors
// whose extremes lie beyond 6 sigma.
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

bool reaches_beyond(const double* out, double limit) {
  const double mean = out[kScanMean];
  return out[kScanMax] - mean > limit || mean - out[kScanMin] > limit;
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

  Chunks again;
  std::vector<std::size_t> owner;
  for (std::size_t t = 0; t < p.tensors.size(); ++t) {
    const std::int64_t first = chunks.first(t);
    double* row = out + t * kScanFields;
    write(combine(parts + first, chunks.first(t + 1) - first), double(p.tensors[t].numel()), row);
    if (!reaches_beyond(row, outlier_limit(row))) continue;
    again.add(p.tensors[t].numel());
    owner.push_back(t);
  }

  std::int64_t* counts = p.workspace.as<std::int64_t>();
  for_each_task(again.count(), bytes_of(again), [&](std::int64_t i) {
    const Chunks::Place place = again[i];
    const Tensor& t = p.tensors[owner[place.tensor]];
    const double* row = out + owner[place.tensor] * kScanFields;
    counts[i] = loops.count_outliers(t.dtype, at(t, place.begin), place.n, float(row[kScanMean]),
                                     float(outlier_limit(row)));
  });
  for (std::size_t k = 0; k < owner.size(); ++k)
    for (std::int64_t i = again.first(k); i < again.first(k + 1); ++i)
      out[owner[k] * kScanFields + kScanOutliers] += double(counts[i]);
}

}  // namespace fastprune::cpu
