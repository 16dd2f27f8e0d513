// norms   sum of (g / scale)^2 and count of non-finite values, per parameter and in total
// update  g' = g * clip / scale;  m += (1 - b1)(g' - m);  v = b2 v + (1 - b2) g'^2
//         w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
//
// The rules are adamw_weight and its kin in core/math.h. Whether the step is sound, by how much the
// gradients are clipped, and the step numbers are worked out by one small block on the device
// between the two passes, so the host waits for nothing.
#include <map>
#include <type_traits>
#include <utility>

#include "core/check.h"
#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kNormChunk = 65536;
constexpr std::int64_t kUpdateChunk = 2048;  // divides 2^32: a chunk has one random key

struct Part {
  double squares;
  double nonfinite;
};

// ---------------------------------------------------------------------------- norms
struct NormRecord {
  const void* g;  // (numel,) G
  std::int64_t numel;
  Part* parts;  // one per chunk
  Part* stats;  // the parameter's row
};

constexpr int kNormInFlight = 4;

template <class G, bool kAligned>
__device__ __forceinline__ Part norm_chunk(const G* g, int n, float unscale) {
  constexpr int kN = 16 / static_cast<int>(sizeof(G));
  const Stripes<kThreads, kN, kAligned> stripes(n);
  float squares = 0;
  int stripe = 0;
  for (; stripe + kNormInFlight <= stripes.whole(); stripe += kNormInFlight) {
    Pack<G, kN> packs[kNormInFlight];
#pragma unroll
    for (int i = 0; i < kNormInFlight; ++i) packs[i] = stripes.load(g, stripe + i);
#pragma unroll
    for (int i = 0; i < kNormInFlight; ++i) {
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const float value = packs[i][k] * unscale;
        squares += value * value;
      }
    }
  }
  stripes.for_each_from(stripe, [&](int i) {
    const float value = to_float(g[i]) * unscale;
    squares += value * value;
  });
  if (squares < INFINITY) return {squares, 0};

  Part part{};  // a second look: non-finite values are counted, and fp64 does not overflow
  stripes.for_each_from(0, [&](int i) {
    const float value = to_float(g[i]) * unscale;
    if (fabsf(value) < INFINITY) {
      part.squares += static_cast<double>(value) * value;
    } else {
      part.nonfinite += 1;
    }
  });
  return part;
}

__device__ __forceinline__ Part reduce_part(Part part) {
  return {block_reduce<kThreads>(part.squares, Sum{}),
          block_reduce<kThreads>(part.nonfinite, Sum{})};
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    adamw_norm_chunks(const __grid_constant__ Table<NormRecord> table, const double* control) {
  const Place place = find_place(table, static_cast<int>(blockIdx.x));
  const NormRecord r = table.records[place.record];
  const std::int64_t begin = place.block * kNormChunk;
  const G* g = static_cast<const G*>(r.g) + begin;
  const int n = static_cast<int>(min(kNormChunk, r.numel - begin));
  const float unscale = gradient_factor(0, 0, control[kLossScale]);
  const Part part = reduce_part(aligned(g, 16) ? norm_chunk<G, true>(g, n, unscale)
                                               : norm_chunk<G, false>(g, n, unscale));
  if (threadIdx.x == 0) r.parts[place.block] = part;
}

// One block per parameter: its chunks in a fixed tree.
__global__ void __launch_bounds__(kThreads)
    adamw_norm_items(const __grid_constant__ Table<NormRecord> table) {
  const NormRecord r = table.records[blockIdx.x];
  const int chunks = static_cast<int>((r.numel + kNormChunk - 1) / kNormChunk);
  Part sum{};
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kThreads) {
    sum.squares += r.parts[i].squares;
    sum.nonfinite += r.parts[i].nonfinite;
  }
  sum = reduce_part(sum);
  if (threadIdx.x == 0) *r.stats = sum;
}

// stats: (slots,), zero where a slot had no gradient; total: (1,)
__global__ void __launch_bounds__(kThreads)
    adamw_norm_total(const Part* stats, std::int64_t slots, Part* total) {
  Part sum{};
  for (std::int64_t i = threadIdx.x; i < slots; i += kThreads) {
    sum.squares += stats[i].squares;
    sum.nonfinite += stats[i].nonfinite;
  }
  sum = reduce_part(sum);
  if (threadIdx.x == 0) *total = sum;
}

// ---------------------------------------------------------------------------- between the passes
// What the update of one parameter reads; step 0 means that nothing is to change.
struct Decision {
  AdamWFactors factors;
  std::int64_t step;
};

struct DecisionRecord {
  AdamWGroup group;
  std::int64_t slot;
};

struct Scaling {
  double max_norm, growth, backoff;
  std::int64_t interval;
};

// One block, so that every thread has read `control` before it changes. The last launch of a step
// changes it.
__global__ void __launch_bounds__(kThreads)
    adamw_decide(const __grid_constant__ Table<DecisionRecord> table, const Part* total,
                 const Scaling scaling, bool last,
                 std::int64_t* steps,    // (slots,)
                 double* control,        // (3,)
                 Decision* decisions) {  // one per record of the table
  const bool sound = sound_step(total->squares, total->nonfinite);
  const float factor = gradient_factor(total->squares, scaling.max_norm, control[kLossScale]);
  for (int i = static_cast<int>(threadIdx.x); i < table.count; i += kThreads) {
    const DecisionRecord& r = table.records[i];
    Decision decision{};
    if (sound) {
      decision.step = ++steps[r.slot];
      decision.factors = adamw_factors(r.group, factor, decision.step);
    }
    decisions[i] = decision;
  }
  __syncthreads();
  if (last && threadIdx.x == 0)
    adapt_loss_scale(control, sound, scaling.growth, scaling.backoff, scaling.interval);
}

// ---------------------------------------------------------------------------- update
struct UpdateRecord {
  void* w;        // (numel,) W
  const void* g;  // (numel,) G
  float* m;       // (numel,)
  float* v;       // (numel,)
  float* master;  // (numel,), or null
  std::int64_t numel;
  std::int64_t slot;
  const Decision* decision;
};

constexpr int kUpdateVector = 4;  // elements side by side: 16 bytes of the fp32 arrays

template <Master M, class W, class G>
struct Update {
  static constexpr bool kMaster = M == Master::fp32 && !std::is_same_v<W, float>;
  static constexpr bool kStochastic = M == Master::stochastic && !std::is_same_v<W, float>;
  using Old = std::conditional_t<kMaster, float, W>;  // where the weight before the step is read

  W* w;  // this chunk of each array
  const G* g;
  float* m;
  float* v;
  float* master;
  AdamWFactors factors;
  std::uint32_t key;
  std::uint32_t first;  // index of the chunk's first element, modulo 2^32

  __device__ __forceinline__ const Old* old() const {
    if constexpr (kMaster)
      return master;
    else
      return w;
  }

  // The rule for element i: new moments and weight in place of the old.
  __device__ __forceinline__ void element(int i, float& weight, float gradient, float& m1,
                                          float& v1, W& stored) const {
    weight = adamw_weight(weight, gradient, m1, v1, factors);
    if constexpr (kStochastic)
      round_to(stochastic(weight, random_bits(first + i, key), W{}), stored);
    else
      round_to(weight, stored);
  }

  template <bool kAligned>
  __device__ __forceinline__ void run(int n) const {
    constexpr int kN = kUpdateVector;
    const Stripes<kThreads, kN, kAligned> stripes(n);
    for (int stripe = 0; stripe < stripes.whole(); ++stripe) {
      const Pack<G, kN> gradients = stripes.load(g, stripe);
      Pack<float, kN> ms = stripes.template load<float>(m, stripe);
      Pack<float, kN> vs = stripes.template load<float>(v, stripe);
      const Pack<Old, kN> olds = stripes.load(old(), stripe);
      Pack<float, kN> weights;
      Pack<W, kN> stored;
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        weights.elements[k] = olds[k];
        element(stripes.at(stripe, k), weights.elements[k], gradients[k], ms.elements[k],
                vs.elements[k], stored.elements[k]);
      }
      stripes.store(ms, m, stripe);
      stripes.store(vs, v, stripe);
      if constexpr (kMaster) stripes.store(weights, master, stripe);
      stripes.store(stored, w, stripe);
    }
    stripes.for_each_from(stripes.whole(), [&](int i) {
      float weight = to_float(old()[i]);
      element(i, weight, to_float(g[i]), m[i], v[i], w[i]);
      if constexpr (kMaster) master[i] = weight;
    });
  }
};

template <Master M, class W, class G>
__global__ void __launch_bounds__(kThreads, 3)
    adamw_update_chunks(const __grid_constant__ Table<UpdateRecord> table, std::uint64_t seed) {
  const Place place = find_place(table, static_cast<int>(blockIdx.x));
  const UpdateRecord r = table.records[place.record];
  const std::int64_t step = r.decision->step;
  if (step == 0) return;
  const std::int64_t begin = place.block * kUpdateChunk;
  const int n = static_cast<int>(min(kUpdateChunk, r.numel - begin));
  Update<M, W, G> update{};
  update.w = static_cast<W*>(r.w) + begin;
  update.g = static_cast<const G*>(r.g) + begin;
  update.m = r.m + begin;
  update.v = r.v + begin;
  update.master = r.master ? r.master + begin : nullptr;
  update.factors = r.decision->factors;
  if constexpr (Update<M, W, G>::kStochastic) {
    update.key = random_key(seed, step, r.slot, static_cast<std::uint32_t>(begin >> 32));
    update.first = static_cast<std::uint32_t>(begin);
  }
  constexpr int kN = kUpdateVector;
  if (aligned(update.w, kN * sizeof(W)) && aligned(update.g, kN * sizeof(G)) &&
      aligned(update.m, 16) && aligned(update.v, 16) && aligned(update.master, 16)) {
    update.template run<true>(n);
  } else {
    update.template run<false>(n);
  }
}

// ---------------------------------------------------------------------------- workspace, launches
struct Workspace {
  Part* parts;
  Decision* decisions;
};

std::int64_t parts_bytes(const std::vector<AdamWItem>& items) {
  std::int64_t chunks = 0;
  for (const AdamWItem& item : items) chunks += ceil_div(item.w.numel(), kNormChunk);
  return aligned_bytes(chunks * std::int64_t{sizeof(Part)});
}

Workspace workspace_of(const AdamWParams& p) {
  char* memory = p.buffers.workspace.as<char>();
  return {reinterpret_cast<Part*>(memory),
          reinterpret_cast<Decision*>(memory + parts_bytes(p.items))};
}

template <class W, class G>
auto update_kernel(Master master) {
  if constexpr (!std::is_same_v<W, float>) {
    if (master == Master::fp32) return adamw_update_chunks<Master::fp32, W, G>;
    if (master == Master::stochastic) return adamw_update_chunks<Master::stochastic, W, G>;
  }
  static_cast<void>(master);
  return adamw_update_chunks<Master::none, W, G>;
}

}  // namespace

std::int64_t adamw_workspace(const std::vector<AdamWItem>& items) {
  return parts_bytes(items) + static_cast<std::int64_t>(items.size() * sizeof(Decision));
}

void adamw_norms(const AdamWParams& p, void* stream_) {
  check(p);
  require(p.buffers.workspace.numel() >= adamw_workspace(p.items), "adamw: workspace is too small");
  const auto stream = static_cast<cudaStream_t>(stream_);
  const DeviceGuard guard(p.buffers.total.device);
  const Workspace workspace = workspace_of(p);
  auto* stats = p.buffers.stats.as<Part>();
  const double* control = p.buffers.control.as<double>();
  const std::int64_t slots = p.buffers.steps.numel();
  if (slots > 0)
    succeed(cudaMemsetAsync(stats, 0, static_cast<std::size_t>(slots) * sizeof(Part), stream),
            "adamw");

  std::vector<NormRecord> all;
  std::map<DType, std::vector<NormRecord>> by_dtype;
  Part* parts = workspace.parts;
  for (const AdamWItem& item : p.items) {
    const NormRecord r{item.g.data, item.g.numel(), parts, stats + item.slot};
    all.push_back(r);
    by_dtype[item.g.dtype].push_back(r);
    parts += ceil_div(r.numel, kNormChunk);
  }
  for (const auto& [dtype, records] : by_dtype)
    dispatch_float(dtype, [&, &records = records](auto type) {
      using G = typename decltype(type)::type;
      TableBuilder<NormRecord> tables([&](const Table<NormRecord>& table, std::int64_t blocks) {
        launch("adamw", adamw_norm_chunks<G>, blocks, kThreads, stream, table, control);
      });
      for (const NormRecord& r : records) tables.add(r, ceil_div(r.numel, kNormChunk));
      tables.finish();
    });
  TableBuilder<NormRecord> tables([&](const Table<NormRecord>& table, std::int64_t blocks) {
    launch("adamw", adamw_norm_items, blocks, kThreads, stream, table);
  });
  for (const NormRecord& r : all) tables.add(r, 1);
  tables.finish();
  launch("adamw", adamw_norm_total, 1, kThreads, stream, stats, slots, p.buffers.total.as<Part>());
}

void adamw_update(const AdamWParams& p, void* stream_) {
  check(p);
  require(p.buffers.workspace.numel() >= adamw_workspace(p.items), "adamw: workspace is too small");
  const auto stream = static_cast<cudaStream_t>(stream_);
  const DeviceGuard guard(p.buffers.total.device);
  Decision* const decisions = workspace_of(p).decisions;
  const Scaling scaling{p.rule.max_norm, p.rule.growth, p.rule.backoff, p.rule.interval};

  const auto items = static_cast<std::int64_t>(p.items.size());
  std::int64_t decided = 0;
  const auto decide = [&](const Table<DecisionRecord>& table, std::int64_t) {
    const bool last = decided + table.count == items;
    launch("adamw", adamw_decide, 1, kThreads, stream, table, p.buffers.total.as<const Part>(),
           scaling, last, p.buffers.steps.as<std::int64_t>(), p.buffers.control.as<double>(),
           decisions + decided);
    decided += table.count;
  };
  TableBuilder<DecisionRecord> to_decide(decide);
  for (const AdamWItem& item : p.items)
    to_decide.add({p.groups[static_cast<std::size_t>(item.group)], item.slot}, 1);
  to_decide.finish();
  if (items == 0) decide(Table<DecisionRecord>{}, 0);  // the loss scale still counts the step

  std::map<std::pair<DType, DType>, std::vector<UpdateRecord>> by_dtypes;
  for (std::int64_t i = 0; i < items; ++i) {
    const AdamWItem& item = p.items[static_cast<std::size_t>(i)];
    by_dtypes[{item.w.dtype, item.g.dtype}].push_back({item.w.data, item.g.data, item.m.as<float>(),
                                                       item.v.as<float>(), item.master.as<float>(),
                                                       item.w.numel(), item.slot, decisions + i});
  }
  for (const auto& [dtypes, records] : by_dtypes)
    dispatch_float(dtypes.first, [&, &dtypes = dtypes, &records = records](auto w_type) {
      dispatch_float(dtypes.second, [&](auto g_type) {
        using W = typename decltype(w_type)::type;
        using G = typename decltype(g_type)::type;
        TableBuilder<UpdateRecord> tables(
            [&](const Table<UpdateRecord>& table, std::int64_t blocks) {
              launch("adamw", update_kernel<W, G>(p.rule.master), blocks, kThreads, stream, table,
                     p.rule.seed);
            });
        for (const UpdateRecord& r : records) tables.add(r, ceil_div(r.numel, kUpdateChunk));
        tables.finish();
      });
    });
}

}  // namespace fastprune::cuda
