// The DLPack C exchange ABI (version 1.3), as far as it is used here, and the conversion of a
// torch tensor into a borrowed view. Written out rather than included: an ABI is a fact.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"

namespace fastprune::dlpack {

struct Version {
  std::uint32_t major, minor;
};

struct Header {
  Version version;
  Header* previous;
};

struct Device {
  std::int32_t type;  // 1 CPU, 2 CUDA, 3 CUDA pinned host
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

// Functions return 0, or -1 with a Python error set. The pointers left untyped are not used here.
struct ExchangeApi {
  Header header;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_py_object)(void* object, ManagedTensor** out);
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

constexpr std::uint32_t kMajor = 1;

// torch.Tensor and its exchange API, set once by connect().
struct Source {
  PyTypeObject* tensor_type = nullptr;
  const ExchangeApi* api = nullptr;
};

inline Source& source() {
  static Source instance;
  return instance;
}

// capsule: torch.Tensor.__dlpack_c_exchange_api__. Throws ValueError when it cannot be used.
inline void connect(pybind11::type tensor_type, pybind11::capsule capsule) {
  const char* const attribute = "__dlpack_c_exchange_api__";
  if (!capsule.is(pybind11::getattr(tensor_type, attribute, pybind11::none())))
    throw pybind11::value_error("the exchange API is not that of the tensor type");
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw pybind11::error_already_set();
  if (api->header.version.major != kMajor || !api->tensor_from_py_object)
    throw pybind11::value_error("torch offers DLPack exchange API version " +
                                std::to_string(api->header.version.major) +
                                ", version 1 is needed");
  source() = {reinterpret_cast<PyTypeObject*>(tensor_type.inc_ref().ptr()), api};
}

inline DType dtype_of(DataType t) {
  if (t.lanes != 1) return DType::other;
  const auto by_bits = [&](DType b8, DType b16, DType b32, DType b64) {
    return t.bits == 8    ? b8
           : t.bits == 16 ? b16
           : t.bits == 32 ? b32
           : t.bits == 64 ? b64
                          : DType::other;
  };
  switch (t.code) {
    case 0:
      return by_bits(DType::i8, DType::i16, DType::i32, DType::i64);
    case 1:
    case 6:
      return t.bits == 8 ? DType::u8 : DType::other;
    case 2:
      return by_bits(DType::other, DType::f16, DType::f32, DType::f64);
    case 4:
      return t.bits == 16 ? DType::bf16 : DType::other;
    default:
      return DType::other;
  }
}

// torch's API for an object that is a tensor, else TypeError.
inline const ExchangeApi& api_for(PyObject* object) {
  const Source& torch = source();
  if (!torch.api) throw pybind11::value_error("fastprune.kernels._C is not connected to torch");
  if (!PyObject_TypeCheck(object, torch.tensor_type))
    throw pybind11::type_error(std::string("expected a torch.Tensor, not ") +
                               Py_TYPE(object)->tp_name);
  return *torch.api;
}

// Throws ValueError for a tensor that no kernel can take: on a device that no backend serves,
// without memory, of more elements than can be counted, or with elements that are not aligned.
inline fastprune::Tensor view_of(const Tensor& t) {
  fastprune::Tensor view;
  view.dtype = dtype_of(t.dtype);
  if (t.device.type == 1 || t.device.type == 3)
    view.device = {DeviceType::cpu, 0};
  else if (t.device.type == 2)
    view.device = {DeviceType::cuda, t.device.id};
  else
    throw pybind11::value_error("a tensor is on a device that no kernel serves");
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  require(view.countable(), "a tensor of shape ", ShapeOf{view}, " has too many elements");
  require(t.data || view.numel() == 0, "a tensor of shape ", ShapeOf{view},
          " has no memory (a FakeTensor?)");
  require(view.aligned(item_size(view.dtype)), "a tensor of shape ", ShapeOf{view},
          " begins at an address that is no multiple of its elements' size; clone() it");
  return view;
}

// Borrows; needs the GIL. The view lives no longer than the tensor keeps its memory and shape.
inline fastprune::Tensor borrow(PyObject* object) {
  Tensor t;
  if (api_for(object).tensor_from_py_object(object, &t) != 0) throw pybind11::error_already_set();
  return view_of(t);
}

// A view that keeps the memory alive, whatever becomes of the tensor. Needs the GIL, also to go.
class Owned {
 public:
  Owned() = default;
  explicit Owned(PyObject* object) {
    ManagedTensor* managed = nullptr;
    if (api_for(object).managed_tensor_from_py_object(object, &managed) != 0)
      throw pybind11::error_already_set();
    managed_.reset(managed);
    view_ = view_of(managed->tensor);
  }
  const fastprune::Tensor& view() const { return view_; }

 private:
  struct Delete {
    void operator()(ManagedTensor* t) const { t->deleter(t); }
  };
  std::unique_ptr<ManagedTensor, Delete> managed_;
  fastprune::Tensor view_;
};

inline void* current_stream(fastprune::Device device) {
  void* stream = nullptr;
  if (source().api->current_work_stream(2, device.index, &stream) != 0)
    throw pybind11::error_already_set();
  return stream;
}

}  // namespace fastprune::dlpack

namespace pybind11::detail {

template <>
struct type_caster<fastprune::Tensor> {
  PYBIND11_TYPE_CASTER(fastprune::Tensor, const_name("torch.Tensor | None"));

  bool load(handle object, bool) {
    value = object.is_none() ? fastprune::Tensor{} : fastprune::dlpack::borrow(object.ptr());
    return true;
  }
};

// A list of tensors, where None is an absent one; other sequences are turned away.
template <>
struct type_caster<std::vector<fastprune::Tensor>> {
  PYBIND11_TYPE_CASTER(std::vector<fastprune::Tensor>, const_name("list[torch.Tensor | None]"));

  bool load(handle object, bool) {
    if (!PyList_Check(object.ptr())) return false;
    const Py_ssize_t n = PyList_GET_SIZE(object.ptr());
    value.reserve(std::size_t(n));
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* item = PyList_GET_ITEM(object.ptr(), i);
      value.push_back(item == Py_None ? fastprune::Tensor{} : fastprune::dlpack::borrow(item));
    }
    return true;
  }
};

}  // namespace pybind11::detail
