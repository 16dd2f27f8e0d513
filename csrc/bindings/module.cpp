// The Python face of the kernels, and the only C++ that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/dlpack.h"
#include "core/check.h"
#include "core/ops.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace py::literals;
using fastprune::Device;
using fastprune::DeviceType;
using fastprune::Tensor;
using fastprune::dlpack::Owned;
using fastprune::dlpack::TensorList;

namespace {

#if defined(FASTPRUNE_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Runs the op's CPU or CUDA function on the device, without the GIL. A backend that is not
// compiled is not named, hence the macro.
#if defined(FASTPRUNE_WITH_CUDA)
#define RUN_ON(device, function, params)                                                    \
  do {                                                                                      \
    const bool on_cuda = (device).type == DeviceType::cuda;                                 \
    void* stream = on_cuda ? fastprune::dlpack::current_stream(device) : nullptr;           \
    py::gil_scoped_release nogil;                                                           \
    on_cuda ? fastprune::cuda::function(params, stream) : fastprune::cpu::function(params); \
  } while (0)
#define WORKSPACE(device, function, ...)                                      \
  ((device).type == DeviceType::cuda ? fastprune::cuda::function(__VA_ARGS__) \
                                     : fastprune::cpu::function(__VA_ARGS__))
#else
#define RUN_ON(device, function, params)                            \
  do {                                                              \
    fastprune::require((device).type == DeviceType::cpu, #function, \
                       ": the CUDA kernels are not compiled in");   \
    py::gil_scoped_release nogil;                                   \
    fastprune::cpu::function(params);                               \
  } while (0)
#define WORKSPACE(device, function, ...) \
  (static_cast<void>(device), fastprune::cpu::function(__VA_ARGS__))
#endif

// ---------------------------------------------------------------------------- taylor
fastprune::Score score_named(const std::string& kind) {
  using fastprune::Score;
  if (kind == "first") return Score::first;
  if (kind == "second") return Score::second;
  if (kind == "mix") return Score::mix;
  if (kind == "vector") return Score::vector;
  if (kind == "l1") return Score::l1;
  if (kind == "l2") return Score::l2;
  fastprune::require(kind == "activation", "taylor: kind '", kind, "' is unknown");
  return Score::activation;
}

std::int64_t taylor_workspace(Tensor w) {
  return WORKSPACE(w.device, taylor_workspace, w.rows(), w.cols());
}

void taylor(const std::string& kind, Tensor w, Tensor g, Tensor h, Tensor x, Tensor rows,
            Tensor cols, Tensor workspace) {
  const fastprune::TaylorParams p{score_named(kind), w, g, h, x, rows, cols, workspace};
  RUN_ON(w.device, taylor, p);
}

// ---------------------------------------------------------------------------- gather
fastprune::GatherParams gather_params(const TensorList& src, const TensorList& index,
                                      const std::vector<int>& dims, const TensorList& dst) {
  const std::size_t n = src.views.size();
  fastprune::require(index.views.size() == n && dims.size() == n && dst.views.size() == n,
                     "gather: the lists have different lengths");
  fastprune::GatherParams p;
  p.items.reserve(n);
  for (std::size_t i = 0; i < n; ++i)
    p.items.push_back({src.views[i], index.views[i], dims[i], dst.views[i]});
  return p;
}

std::int64_t gather_workspace([[maybe_unused]] const TensorList& src,
                              [[maybe_unused]] const TensorList& index,
                              [[maybe_unused]] const std::vector<int>& dims,
                              [[maybe_unused]] const TensorList& dst) {
#if defined(FASTPRUNE_WITH_CUDA)
  if (!src.views.empty() && src.views[0].device.type == DeviceType::cuda)
    return fastprune::cuda::gather_workspace(gather_params(src, index, dims, dst).items);
#endif
  return 0;
}

void gather(const TensorList& src, const TensorList& index, const std::vector<int>& dims,
            const TensorList& dst, Tensor workspace, bool fresh) {
  fastprune::GatherParams p = gather_params(src, index, dims, dst);
  p.fresh = fresh;
  p.workspace = workspace;
  if (!p.items.empty()) RUN_ON(p.items[0].src.device, gather, p);
}

// ---------------------------------------------------------------------------- scan
std::int64_t scan_workspace(const TensorList& tensors) {
  const Device device = tensors.views.empty() ? Device{} : tensors.views[0].device;
  return WORKSPACE(device, scan_workspace, tensors.views);
}

void scan(const TensorList& tensors, Tensor out, Tensor workspace) {
  const fastprune::ScanParams p{tensors.views, out, workspace};
  RUN_ON(out.device, scan, p);
}

// ---------------------------------------------------------------------------- adamw
fastprune::Master master_named(const std::string& mode) {
  using fastprune::Master;
  if (mode == "none") return Master::none;
  if (mode == "fp32") return Master::fp32;
  fastprune::require(mode == "stochastic", "adamw: master '", mode, "' is unknown");
  return Master::stochastic;
}

std::int64_t adamw_workspace(const TensorList& params) {
  std::vector<fastprune::AdamWItem> items(params.views.size());
  for (std::size_t i = 0; i < items.size(); ++i) items[i].w = params.views[i];
  const Device device = items.empty() ? Device{} : items[0].w.device;
  return WORKSPACE(device, adamw_workspace, items);
}

// Moments and master weights of all parameters, kept from step to step: to borrow them anew would
// cost more than all else in a step of small tensors. A tensor is looked at again when another
// object has taken its place; its memory cannot go while it is held.
class AdamWStates {
 public:
  struct State {
    py::object m_object, v_object, master_object;
    Owned m, v, master;
  };

  // states: one dict per parameter with the tensors "exp_avg", "exp_avg_sq" and perhaps "master".
  void sync(const py::list& states) {
    held_.resize(states.size());
    for (std::size_t i = 0; i < held_.size(); ++i) {
      PyObject* state = PyList_GET_ITEM(states.ptr(), Py_ssize_t(i));
      if (!PyDict_Check(state)) throw py::type_error("adamw: a state is not a dict");
      State& held = held_[i];
      update(state, exp_avg_.ptr(), held.m_object, held.m);
      update(state, exp_avg_sq_.ptr(), held.v_object, held.v);
      update(state, master_.ptr(), held.master_object, held.master);
    }
  }
  const std::vector<State>& held() const { return held_; }

 private:
  static void update(PyObject* state, PyObject* key, py::object& object, Owned& owned) {
    PyObject* now = PyDict_GetItemWithError(state, key);
    if (!now && PyErr_Occurred()) throw py::error_already_set();
    if (now == Py_None) now = nullptr;
    if (now == object.ptr()) return;
    owned = now ? Owned(now) : Owned();
    object = py::reinterpret_borrow<py::object>(now);
  }

  std::vector<State> held_;
  py::str exp_avg_{"exp_avg"}, exp_avg_sq_{"exp_avg_sq"}, master_{"master"};
};

// One step over borrowed tensors; the lists and buffers are kept alive as long as the object, which
// is meant to live for one step. Parameters without a gradient (None) are left out.
class AdamWStep {
 public:
  AdamWStep(const TensorList& params, const TensorList& grads, const AdamWStates& states,
            const std::vector<int>& group_of, const std::vector<std::vector<double>>& groups,
            Tensor steps, Tensor stats, Tensor total, Tensor control, Tensor workspace,
            double max_norm, const std::string& master, std::uint64_t seed, double growth,
            double backoff, std::int64_t interval) {
    const std::size_t n = params.views.size();
    fastprune::require(grads.views.size() == n && states.held().size() == n && group_of.size() == n,
                       "adamw: the lists have different lengths");
    p_.items.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      if (!grads.views[i].present()) continue;
      const AdamWStates::State& state = states.held()[i];
      p_.items.push_back({params.views[i], grads.views[i], state.m.view(), state.v.view(),
                          state.master.view(), group_of[i], std::int64_t(i)});
    }
    for (const auto& g : groups) {
      fastprune::require(g.size() == 5, "adamw: a group has lr, beta1, beta2, eps, weight_decay");
      p_.groups.push_back({g[0], g[1], g[2], g[3], g[4]});
    }
    p_.steps = steps;
    p_.stats = stats;
    p_.total = total;
    p_.control = control;
    p_.workspace = workspace;
    p_.max_norm = max_norm;
    p_.master = master_named(master);
    p_.seed = seed;
    p_.growth = growth;
    p_.backoff = backoff;
    p_.interval = interval;
  }

  // Parameters whose gradient is not laid out like the weight.
  std::vector<std::int64_t> misfits() const {
    std::vector<std::int64_t> slots;
    for (const auto& item : p_.items)
      if (!item.g.same_layout(item.w)) slots.push_back(item.slot);
    return slots;
  }

  void norms() const { RUN_ON(p_.total.device, adamw_norms, p_); }
  void update() const { RUN_ON(p_.total.device, adamw_update, p_); }

 private:
  fastprune::AdamWParams p_;
};

// ---------------------------------------------------------------------------- cross_entropy
void cross_entropy(Tensor logits, Tensor targets, Tensor loss, Tensor log_normaliser,
                   std::optional<float> scale) {
  const fastprune::CrossEntropyParams p{logits,         targets,           loss,
                                        log_normaliser, scale.has_value(), scale.value_or(1)};
  RUN_ON(logits.device, cross_entropy, p);
}

// ---------------------------------------------------------------------------- attention
void attention(Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor workspace,
               float scale) {
  fastprune::AttentionParams p;
  p.q = q, p.k = k, p.v = v, p.out = out, p.log_sums = log_sums;
  p.workspace = workspace;
  p.scale = scale;
  py::gil_scoped_release nogil;
  fastprune::cpu::attention(p);
}

void attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums,
                        Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor workspace,
                        float scale) {
  fastprune::AttentionParams p;
  p.q = q, p.k = k, p.v = v, p.out = out, p.log_sums = log_sums;
  p.grad_out = grad_out, p.grad_q = grad_q, p.grad_k = grad_k, p.grad_v = grad_v;
  p.workspace = workspace;
  p.scale = scale;
  py::gil_scoped_release nogil;
  fastprune::cpu::attention_backward(p);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastprune; fastprune.kernels.ops is their only caller.";
  m.attr("with_cuda") = kWithCuda;

  m.def("connect", &fastprune::dlpack::connect, "tensor_type"_a, "exchange_api"_a);
  m.def(
      "set_parallel_for",
      [](std::uintptr_t function) {
        fastprune::cpu::set_parallel_for(reinterpret_cast<fastprune::cpu::ParallelFor>(function));
      },
      "function"_a, "Address of torch_parallel_for, or 0 to run on the calling thread.");
  m.def("cpu_levels", &fastprune::cpu::usable_levels);
  m.def("cpu_level", [] { return std::string(fastprune::cpu::level().name); });
  m.def("set_cpu_level", &fastprune::cpu::choose_level, "name"_a);
#if defined(FASTPRUNE_WITH_CUDA)
  m.def("cuda_unavailable_reason", &fastprune::cuda::unavailable_reason);
#else
  m.def("cuda_unavailable_reason", [] { return "the CUDA kernels are not compiled in"; });
#endif

  m.def("taylor_workspace", &taylor_workspace, "w"_a);
  m.def("taylor", &taylor, "kind"_a, "w"_a, "g"_a, "h"_a, "x"_a, "rows"_a, "cols"_a, "workspace"_a);
  m.def("gather_workspace", &gather_workspace, "src"_a, "index"_a, "dims"_a, "dst"_a);
  m.def("gather", &gather, "src"_a, "index"_a, "dims"_a, "dst"_a, "workspace"_a, "fresh"_a);
  m.def("scan_workspace", &scan_workspace, "tensors"_a);
  m.def("scan", &scan, "tensors"_a, "out"_a, "workspace"_a);
  m.def("adamw_workspace", &adamw_workspace, "params"_a);
  py::class_<AdamWStates>(m, "AdamWStates")
      .def(py::init<>())
      .def("sync", &AdamWStates::sync, "states"_a);
  py::class_<AdamWStep>(m, "AdamWStep")
      .def(py::init<const TensorList&, const TensorList&, const AdamWStates&,
                    const std::vector<int>&, const std::vector<std::vector<double>>&, Tensor,
                    Tensor, Tensor, Tensor, Tensor, double, const std::string&, std::uint64_t,
                    double, double, std::int64_t>(),
           "params"_a, "grads"_a, "states"_a, "group_of"_a, "groups"_a, "steps"_a, "stats"_a,
           "total"_a, "control"_a, "workspace"_a, "max_norm"_a, "master"_a, "seed"_a, "growth"_a,
           "backoff"_a, "interval"_a, py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
           py::keep_alive<1, 4>(), py::keep_alive<1, 7>(), py::keep_alive<1, 8>(),
           py::keep_alive<1, 9>(), py::keep_alive<1, 10>(), py::keep_alive<1, 11>())
      .def("misfits", &AdamWStep::misfits)
      .def("norms", &AdamWStep::norms)
      .def("update", &AdamWStep::update);
  m.def("cross_entropy", &cross_entropy, "logits"_a, "targets"_a, "loss"_a, "log_normaliser"_a,
        "scale"_a);
  m.def("attention_serves", &fastprune::cpu::attention_serves);
  m.def("attention_workspace", &fastprune::cpu::attention_workspace, "q"_a, "k"_a);
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "out"_a, "log_sums"_a, "workspace"_a,
        "scale"_a);
  m.def("attention_backward_workspace", &fastprune::cpu::attention_backward_workspace, "q"_a,
        "at_once"_a);
  m.def("attention_backward", &attention_backward, "grad_out"_a, "q"_a, "k"_a, "v"_a, "out"_a,
        "log_sums"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "workspace"_a, "scale"_a);
}
