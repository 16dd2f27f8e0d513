// The two passes of the optimizer: chunks of all tensors in one parallel loop each.
#include "core/check.h"
#include "cpu/chunks.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {

Chunks chunks_of(const std::vector<AdamWItem>& items) {
  Chunks chunks;
  for (const AdamWItem& item : items) chunks.add(item.w.numel());
  return chunks;
}

float* at(const Tensor& t, std::int64_t i) { return t.present() ? t.as<float>() + i : nullptr; }

}  // namespace

std::int64_t adamw_workspace(const std::vector<AdamWItem>& items) {
  return chunks_of(items).count() * std::int64_t(sizeof(NormPart));
}

void adamw_norms(const AdamWParams& p) {
  check(p);
  const Chunks chunks = chunks_of(p.items);
  require(p.buffers.workspace.numel() >= chunks.count() * std::int64_t(sizeof(NormPart)),
          "adamw: workspace is too small");
  NormPart* parts = p.buffers.workspace.as<NormPart>();
  const float unscale = gradient_factor(0, 0, p.buffers.control.as<double>()[kLossScale]);
  const Level& loops = level();
  for_each_task(chunks.count(), bytes_of(chunks), [&](std::int64_t i) {
    const Chunks::Place place = chunks[i];
    const Tensor& g = p.items[place.tensor].g;
    parts[i] = loops.norm_chunk(g.dtype, g.as<const char>() + place.begin * item_size(g.dtype),
                                place.n, unscale);
  });

  double* stats = p.buffers.stats.as<double>();
  double* total = p.buffers.total.as<double>();
  for (std::int64_t i = 0; i < 2 * p.buffers.steps.numel(); ++i) stats[i] = 0;
  total[0] = total[1] = 0;
  for (std::size_t t = 0; t < p.items.size(); ++t) {
    double* row = stats + 2 * p.items[t].slot;
    for (std::int64_t i = chunks.first(t); i < chunks.first(t + 1); ++i) {
      row[0] += parts[i].squares;
      row[1] += parts[i].nonfinite;
    }
    total[0] += row[0];
    total[1] += row[1];
  }
}

void adamw_update(const AdamWParams& p) {
  check(p);
  const double* total = p.buffers.total.as<double>();
  const bool sound = sound_step(total[0], total[1]);
  if (sound) {
    const Chunks chunks = chunks_of(p.items);
    const float factor =
        gradient_factor(total[0], p.rule.max_norm, p.buffers.control.as<double>()[kLossScale]);
    std::int64_t* steps = p.buffers.steps.as<std::int64_t>();
    std::vector<AdamWFactors> factors;
    factors.reserve(p.items.size());
    for (const AdamWItem& item : p.items) {
      const std::int64_t step = ++steps[item.slot];
      const std::size_t previous = std::size_t(&item - p.items.data()) - 1;
      // Neighbours mostly agree, and two powers cost more than a small tensor's update.
      const bool same = !factors.empty() && p.items[previous].group == item.group &&
                        steps[p.items[previous].slot] == step;
      factors.push_back(same ? factors.back()
                             : adamw_factors(p.groups[std::size_t(item.group)], factor, step));
    }
    const Level& loops = level();
    for_each_task(chunks.count(), bytes_of(chunks), [&](std::int64_t i) {
      const Chunks::Place place = chunks[i];
      const AdamWItem& item = p.items[place.tensor];
      AdamWChunk chunk{};
      chunk.w = item.w.as<char>() + place.begin * item_size(item.w.dtype);
      chunk.g = item.g.as<const char>() + place.begin * item_size(item.g.dtype);
      chunk.m = at(item.m, place.begin);
      chunk.v = at(item.v, place.begin);
      chunk.master = at(item.master, place.begin);
      chunk.w_dtype = item.w.dtype;
      chunk.g_dtype = item.g.dtype;
      chunk.n = place.n;
      chunk.mode = p.rule.master;
      chunk.factors = factors[place.tensor];
      chunk.first = std::uint32_t(place.begin);
      chunk.key = random_key(p.rule.seed, steps[item.slot], item.slot,
                             std::uint32_t(std::uint64_t(place.begin) >> 32));
      loops.adamw_chunk(chunk);
    });
  }
  adapt_loss_scale(p.buffers.control.as<double>(), sound, p.rule.growth, p.rule.backoff,
                   p.rule.interval);
}

}  // namespace fastprune::cpu
