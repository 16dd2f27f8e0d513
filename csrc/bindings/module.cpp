// The Python face of the kernels, and the only C++ that knows Python. The arguments of each op are
// those that fastprune/kernels/declarations.py lists, in its order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

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
using Tensors = std::vector<Tensor>;

// ---------------------------------------------------------------------------- values
namespace pybind11::detail {

template <class Enum, std::size_t n>
Enum member_named(handle name, const char* what, const std::pair<const char*, Enum> (&members)[n]) {
  const auto wanted = name.cast<std::string>();
  for (const auto& [known, member] : members)
    if (wanted == known) return member;
  fastprune::require(false, what, " '", wanted, "' is unknown");
  return members[0].second;
}

template <>
struct type_caster<fastprune::Score> {
  PYBIND11_TYPE_CASTER(fastprune::Score, const_name("str"));

  bool load(handle name, bool) {
    using fastprune::Score;
    if (!isinstance<str>(name)) return false;
    static constexpr std::pair<const char*, Score> kKinds[] = {
        {"first", Score::first},          {"second", Score::second}, {"mix", Score::mix},
        {"vector", Score::vector},        {"l1", Score::l1},         {"l2", Score::l2},
        {"activation", Score::activation}};
    value = member_named(name, "taylor: kind", kKinds);
    return true;
  }
};

template <>
struct type_caster<fastprune::AdamWRule> {
  PYBIND11_TYPE_CASTER(fastprune::AdamWRule, const_name("AdamWRule"));

  bool load(handle rule, bool) {
    using fastprune::Master;
    static constexpr std::pair<const char*, Master> kMasters[] = {
        {"none", Master::none}, {"fp32", Master::fp32}, {"stochastic", Master::stochastic}};
    if (!isinstance<str>(getattr(rule, "master", none()))) return false;
    value.max_norm = rule.attr("max_norm").cast<double>();
    value.master = member_named(rule.attr("master"), "adamw: master", kMasters);
    value.seed = rule.attr("seed").cast<std::uint64_t>();
    value.growth = rule.attr("growth").cast<double>();
    value.backoff = rule.attr("backoff").cast<double>();
    value.interval = rule.attr("interval").cast<std::int64_t>();
    return true;
  }
};

template <>
struct type_caster<fastprune::AdamWBuffers> {
  PYBIND11_TYPE_CASTER(fastprune::AdamWBuffers, const_name("AdamWBuffers"));

  bool load(handle buffers, bool) {
    value.steps = buffers.attr("steps").cast<Tensor>();
    value.stats = buffers.attr("stats").cast<Tensor>();
    value.total = buffers.attr("total").cast<Tensor>();
    value.control = buffers.attr("control").cast<Tensor>();
    value.workspace = buffers.attr("workspace").cast<Tensor>();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

// ---------------------------------------------------------------------------- backends
// The functions of an op by device. A backend that is not compiled in is not named, hence macros.
#if defined(FASTPRUNE_WITH_CUDA)
constexpr bool kWithCuda = true;
#define BACKENDS(op) &fastprune::cpu::op, &fastprune::cuda::op
#define WORKSPACE(device, function, ...)                                      \
  ((device).type == DeviceType::cuda ? fastprune::cuda::function(__VA_ARGS__) \
                                     : fastprune::cpu::function(__VA_ARGS__))
#else
constexpr bool kWithCuda = false;
#define BACKENDS(op) &fastprune::cpu::op, nullptr
#define WORKSPACE(device, function, ...) \
  (static_cast<void>(device), fastprune::cpu::function(__VA_ARGS__))
#endif

template <class Params>
using OnCpu = void (*)(const Params&);
template <class Params>
using OnCuda = void (*)(const Params&, void* stream);

// Runs an op on the device, without the GIL.
template <class Params>
void run(const Params& p, Device device, OnCpu<Params> cpu, OnCuda<Params> cuda) {
  const bool on_cuda = device.type == DeviceType::cuda;
  fastprune::require(!on_cuda || cuda, "no CUDA kernel of this op is compiled in");
  void* stream = on_cuda ? fastprune::dlpack::current_stream(device) : nullptr;
  py::gil_scoped_release nogil;
  on_cuda ? cuda(p, stream) : cpu(p);
}

template <class Params, class Member>
struct Argument {
  const char* name;
  Member Params::* member;
  bool optional;

  py::arg as_arg() const { return py::arg(name).none(optional); }
};

template <class Params, class Member>
Argument<Params, Member> argument(const char* name, Member Params::* member) {
  return {name, member, false};
}

// One that may be None.
template <class Params, class Member>
Argument<Params, Member> optional(const char* name, Member Params::* member) {
  return {name, member, true};
}

py::arg required(const char* name) { return py::arg(name).none(false); }

// Binds an op whose arguments are members of its params struct; it runs where `on` lies.
template <class Params, class... Members>
void def_op(py::module_& m, const char* name, Tensor Params::* on, OnCpu<Params> cpu,
            OnCuda<Params> cuda, Argument<Params, Members>... arguments) {
  m.def(
      name,
      [=](Members... values) {
        Params p;
        ((p.*arguments.member = std::move(values)), ...);
        run<Params>(p, (p.*on).device, cpu, cuda);
      },
      arguments.as_arg()...);
}

// ---------------------------------------------------------------------------- gather
fastprune::GatherParams gather_params(const Tensors& tensors, const Tensors& indices,
                                      const std::vector<int>& dims, const Tensors& out) {
  const std::size_t n = tensors.size();
  fastprune::require(indices.size() == n && dims.size() == n && out.size() == n,
                     "gather: the lists have different lengths");
  fastprune::GatherParams p;
  p.items.reserve(n);
  for (std::size_t i = 0; i < n; ++i) p.items.push_back({tensors[i], indices[i], dims[i], out[i]});
  return p;
}

std::int64_t gather_workspace([[maybe_unused]] const Tensors& tensors,
                              [[maybe_unused]] const Tensors& indices,
                              [[maybe_unused]] const std::vector<int>& dims,
                              [[maybe_unused]] const Tensors& out) {
#if defined(FASTPRUNE_WITH_CUDA)
  if (!tensors.empty() && tensors[0].device.type == DeviceType::cuda)
    return fastprune::cuda::gather_workspace(gather_params(tensors, indices, dims, out).items);
#endif
  return 0;
}

void gather(const Tensors& tensors, const Tensors& indices, const std::vector<int>& dims,
            bool fresh, const Tensors& out, Tensor workspace) {
  fastprune::GatherParams p = gather_params(tensors, indices, dims, out);
  p.fresh = fresh;
  p.workspace = workspace;
  if (!p.items.empty()) run<fastprune::GatherParams>(p, p.items[0].src.device, BACKENDS(gather));
}

// ---------------------------------------------------------------------------- adamw
std::int64_t adamw_workspace(const Tensors& params) {
  std::vector<fastprune::AdamWItem> items(params.size());
  for (std::size_t i = 0; i < items.size(); ++i) items[i].w = params[i];
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
  // Steps made before look no further at what is held here.
  void sync(const py::list& states) {
    ++syncs_;
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
  std::int64_t syncs() const { return syncs_; }

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
  std::int64_t syncs_ = 0;
  py::str exp_avg_{"exp_avg"}, exp_avg_sq_{"exp_avg_sq"}, master_{"master"};
};

// One step over borrowed tensors, which are kept alive as long as the object; it is meant to live
// for one step. Parameters without a gradient (None) are left out.
class AdamWStep {
 public:
  AdamWStep(const py::list& param_list, const py::list& grad_list, const AdamWStates& states,
            const std::vector<int>& group_of, const std::vector<std::vector<double>>& groups,
            const fastprune::AdamWBuffers& buffers, const fastprune::AdamWRule& rule)
      : alive_(py::tuple(param_list), py::tuple(grad_list)),
        states_(states),
        syncs_(states.syncs()) {
    const Tensors params = param_list.cast<Tensors>(), grads = grad_list.cast<Tensors>();
    const std::size_t n = params.size();
    fastprune::require(grads.size() == n && states.held().size() == n && group_of.size() == n,
                       "adamw: the lists have different lengths");
    p_.items.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      if (!grads[i].present()) continue;
      const AdamWStates::State& state = states.held()[i];
      p_.items.push_back({params[i], grads[i], state.m.view(), state.v.view(), state.master.view(),
                          group_of[i], std::int64_t(i)});
    }
    for (const auto& g : groups) {
      fastprune::require(g.size() == 5, "adamw: a group has lr, beta1, beta2, eps, weight_decay");
      p_.groups.push_back({g[0], g[1], g[2], g[3], g[4]});
    }
    p_.buffers = buffers;
    p_.rule = rule;
  }

  // Parameters whose gradient is not laid out like the weight.
  std::vector<std::int64_t> misfits() const {
    std::vector<std::int64_t> slots;
    for (const auto& item : p_.items)
      if (!item.g.same_layout(item.w)) slots.push_back(item.slot);
    return slots;
  }

  void norms() const { pass(BACKENDS(adamw_norms)); }
  void update() const { pass(BACKENDS(adamw_update)); }

 private:
  void pass(OnCpu<fastprune::AdamWParams> cpu, OnCuda<fastprune::AdamWParams> cuda) const {
    fastprune::require(states_.syncs() == syncs_,
                       "adamw: the states were synced anew since this step was made; make another");
    run<fastprune::AdamWParams>(p_, p_.buffers.total.device, cpu, cuda);
  }

  std::pair<py::tuple, py::tuple> alive_;  // the lists themselves may change
  const AdamWStates& states_;
  std::int64_t syncs_;
  fastprune::AdamWParams p_;
};

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

  using Taylor = fastprune::TaylorParams;
  m.def(
      "taylor_workspace",
      [](Tensor w) { return WORKSPACE(w.device, taylor_workspace, w.rows(), w.cols()); },
      required("w"));
  def_op<Taylor>(m, "taylor", &Taylor::w, BACKENDS(taylor), argument("w", &Taylor::w),
                 optional("g", &Taylor::g), optional("h", &Taylor::h), optional("x", &Taylor::x),
                 argument("kind", &Taylor::score), argument("rows", &Taylor::rows),
                 argument("cols", &Taylor::cols), argument("workspace", &Taylor::workspace));

  m.def("gather_workspace", &gather_workspace, "tensors"_a, "indices"_a, "dims"_a, "out"_a);
  m.def("gather", &gather, "tensors"_a, "indices"_a, "dims"_a, "fresh"_a, "out"_a, "workspace"_a);

  using Scan = fastprune::ScanParams;
  m.def(
      "scan_workspace",
      [](const Tensors& tensors) {
        const Device device = tensors.empty() ? Device{} : tensors[0].device;
        return WORKSPACE(device, scan_workspace, tensors);
      },
      "tensors"_a);
  def_op<Scan>(m, "scan", &Scan::out, BACKENDS(scan), argument("tensors", &Scan::tensors),
               argument("out", &Scan::out), argument("workspace", &Scan::workspace));

  m.def("adamw_workspace", &adamw_workspace, "params"_a);
  py::class_<AdamWStates>(m, "AdamWStates")
      .def(py::init<>())
      .def("sync", &AdamWStates::sync, "states"_a);
  py::class_<AdamWStep>(m, "AdamWStep")
      .def(py::init<const py::list&, const py::list&, const AdamWStates&, const std::vector<int>&,
                    const std::vector<std::vector<double>>&, const fastprune::AdamWBuffers&,
                    const fastprune::AdamWRule&>(),
           "params"_a, "grads"_a, required("states"), "group_of"_a, "groups"_a, "buffers"_a,
           "rule"_a, py::keep_alive<1, 4>(), py::keep_alive<1, 7>())
      .def("misfits", &AdamWStep::misfits)
      .def("norms", &AdamWStep::norms)
      .def("update", &AdamWStep::update);

  using CrossEntropy = fastprune::CrossEntropyParams;
  def_op<CrossEntropy>(
      m, "cross_entropy", &CrossEntropy::logits, BACKENDS(cross_entropy),
      argument("logits", &CrossEntropy::logits), argument("targets", &CrossEntropy::targets),
      optional("scale", &CrossEntropy::scale), argument("loss", &CrossEntropy::loss),
      argument("log_normaliser", &CrossEntropy::log_normaliser));

  using Attention = fastprune::AttentionParams;
  m.def("attention_serves", &fastprune::cpu::attention_serves);
  m.def("attention_workspace", &fastprune::cpu::attention_workspace, required("q"), required("k"));
  def_op<Attention>(m, "attention", &Attention::q, &fastprune::cpu::attention, nullptr,
                    argument("q", &Attention::q), argument("k", &Attention::k),
                    argument("v", &Attention::v), argument("scale", &Attention::scale),
                    argument("out", &Attention::out), argument("log_sums", &Attention::log_sums),
                    argument("workspace", &Attention::workspace));
  m.def("attention_backward_workspace", &fastprune::cpu::attention_backward_workspace,
        required("q"), "at_once"_a);
  def_op<Attention>(
      m, "attention_backward", &Attention::q, &fastprune::cpu::attention_backward, nullptr,
      argument("grad_out", &Attention::grad_out), argument("q", &Attention::q),
      argument("k", &Attention::k), argument("v", &Attention::v), argument("out", &Attention::out),
      argument("log_sums", &Attention::log_sums), argument("scale", &Attention::scale),
      argument("grad_q", &Attention::grad_q), argument("grad_k", &Attention::grad_k),
      argument("grad_v", &Attention::grad_v), argument("workspace", &Attention::workspace));
}
