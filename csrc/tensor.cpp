#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastvit {
namespace {

// What torch.Tensor.__dlpack_c_exchange_api__ points at: DLPack's table of functions, of which one
// is wanted here. Its layout stays within a major version.
namespace dlpack {

constexpr int kCpu = 1;
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Api {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*read)(void* object, Tensor* out);  // borrows; 0, or -1 with an exception set
  void* stream;
};

}  // namespace dlpack

constexpr int kDTypes = 5;

// Attribute names and dtypes that live as long as the process.
struct Torch {
  PyTypeObject* types[2];  // Tensor and Parameter; others may hide what they hold
  decltype(dlpack::Api::read) read = nullptr;
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtypes[kDTypes];
  PyTypeObject* dtype_type;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    // The order of DType, with float16 from cuda/kernels.h.
    const char* names[] = {"float32", "bfloat16", "uint8", "float16", "int8"};
    for (int i = 0; i < kDTypes; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    const auto type = [](const py::object& name) {
      return reinterpret_cast<PyTypeObject*>(py::object(name).release().ptr());
    };
    types[0] = type(torch.attr("Tensor")), types[1] = type(torch.attr("nn").attr("Parameter"));
    dtype_type = type(torch.attr("dtype"));
    const py::object capsule =
        py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") == 0) return;
    const auto* api =
        static_cast<const dlpack::Api*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->major == 1) read = api->read;
  }
};

// By DLPack: in less time than through Python's attributes, which serve what this does not.
bool read_quickly(const Torch& torch, PyObject* t, View& view) {
  if (torch.read == nullptr || (Py_TYPE(t) != torch.types[0] && Py_TYPE(t) != torch.types[1])) {
    return false;
  }
  dlpack::Tensor from;
  if (torch.read(t, &from) != 0) {
    PyErr_Clear();
    return false;
  }
  struct {
    uint8_t code, bits;
  } constexpr dtypes[kDTypes] = {{dlpack::kFloat, 32},  // in the order of Torch::dtypes
                                 {dlpack::kBFloat, 16},
                                 {dlpack::kUInt, 8},
                                 {dlpack::kFloat, 16},
                                 {dlpack::kInt, 8}};
  const auto is = [&](int i) { return dtypes[i].code == from.code && dtypes[i].bits == from.bits; };
  int code = 0;
  while (code < kDTypes && !is(code)) ++code;
  if (code == kDTypes || from.lanes != 1 || from.byte_offset != 0 || from.data == nullptr ||
      from.device_type != dlpack::kCpu || from.ndim > kMaxDims) {
    return false;
  }
  view.data = from.data;
  view.dtype = static_cast<DType>(code);
  view.ndim = from.ndim;
  std::copy_n(from.shape, from.ndim, view.size);
  std::copy_n(from.strides, from.ndim, view.stride);
  return true;
}

const Torch& torch_names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> once;
  return once.call_once_and_store_result([] { return Torch(); }).get_stored();
}

template <class T>
void append(std::string& out, char kind, const T& value) {
  out += kind;
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

bool append_kind(const Torch& torch, PyObject* a, std::string& out) {
  if (a == Py_None) {
    out += 'n';
  } else if (PyBool_Check(a)) {
    out += a == Py_True ? 'T' : 'F';
  } else if (PyFloat_CheckExact(a)) {
    append(out, 'f', PyFloat_AS_DOUBLE(a));
  } else if (PyLong_CheckExact(a)) {
    int overflow = 0;
    append(out, 'i', PyLong_AsLongLongAndOverflow(a, &overflow));
    return overflow == 0;
  } else if (PyUnicode_CheckExact(a)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(a, &size);
    if (text == nullptr) return PyErr_Clear(), false;
    append(out, 's', size);
    out.append(text, static_cast<size_t>(size));
  } else if (Py_TYPE(a) == torch.dtype_type) {
    append(out, 'd', a);  // there is one object of each
  } else if (PyTuple_CheckExact(a) || PyList_CheckExact(a)) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(a);
    append(out, PyTuple_CheckExact(a) ? '(' : '[', size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!append_kind(torch, PySequence_Fast_GET_ITEM(a, i), out)) return false;
    }
  } else {
    View view{};
    if (!read_quickly(torch, a, view)) return false;
    out += 't';
    out += static_cast<char>(view.dtype);
    out += static_cast<char>(view.ndim);
    out.append(reinterpret_cast<const char*>(view.size),
               static_cast<size_t>(view.ndim) * sizeof(int64_t));
  }
  return true;
}

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Where the element lies that is `at` in order, the last dimension first.
int64_t offset_of(const View& view, int64_t at) {
  int64_t offset = 0;
  for (int i = view.ndim - 1; i >= 0; --i) {
    offset += at % view.size[i] * view.stride[i];
    at /= view.size[i];
  }
  return offset;
}

void read_tuple(const py::object& source, int64_t* out) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(source.ptr()); ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
  }
}

}  // namespace

View view_of(py::handle tensor) {
  const Torch& torch = torch_names();
  PyObject* t = tensor.ptr();
  View view{};
  if (read_quickly(torch, t, view)) return view;
  const py::object dtype = checked(PyObject_GetAttr(t, torch.dtype));
  int code = 0;
  while (code < kDTypes && torch.dtypes[code] != dtype.ptr()) ++code;
  if (code == kDTypes) {
    throw std::invalid_argument(
        "dtype " + std::string(py::str(dtype)) +
        " is not accepted; accepted: float32, bfloat16, float16, uint8, int8");
  }
  const py::object data = checked(PyObject_CallMethodNoArgs(t, torch.data_ptr));
  const py::object shape = checked(PyObject_GetAttr(t, torch.shape));
  const py::object stride = checked(PyObject_CallMethodNoArgs(t, torch.stride));
  if (PyTuple_GET_SIZE(shape.ptr()) > kMaxDims) {
    throw std::invalid_argument("shape " + std::string(py::str(shape)) +
                                " is not accepted; accepted: at most " + std::to_string(kMaxDims) +
                                " dimensions");
  }
  view.data = PyLong_AsVoidPtr(data.ptr());
  view.dtype = static_cast<DType>(code);
  view.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  read_tuple(shape, view.size);
  read_tuple(stride, view.stride);
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i) count *= view.size[i];
  if (view.data == nullptr && count > 0) {
    throw std::invalid_argument("a tensor of shape " + std::string(py::str(shape)) +
                                " has no memory: its storage was resized to nothing");
  }
  return view;
}

py::object kinds_of(py::tuple arguments) {
  std::string kinds;
  kinds.reserve(256);
  if (!append_kind(torch_names(), arguments.ptr(), kinds)) return py::none();
  return py::bytes(kinds);
}

uint64_t fingerprint(const View& view) {
  constexpr int64_t kSamples = 64;
  const int64_t size = view.dtype == DType::kF32                              ? 4
                       : view.dtype == DType::kU8 || view.dtype == DType::kI8 ? 1
                                                                              : 2;
  uint64_t hash = reinterpret_cast<uintptr_t>(view.data);
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15U;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(view.dtype));
  int64_t count = 1;
  bool dense = true;
  for (int i = view.ndim - 1; i >= 0; --i) {
    mix(static_cast<uint64_t>(view.size[i]));
    mix(static_cast<uint64_t>(view.stride[i]));
    dense = dense && view.stride[i] == count;
    count *= view.size[i];
  }
  const int64_t samples = count < kSamples ? count : kSamples;
  for (int64_t sample = 0; sample < samples; ++sample) {
    // The odd term keeps the samples of a matrix out of one column.
    const int64_t at = (count / samples * sample + 7 * sample) % count;
    uint64_t element = 0;
    std::memcpy(&element,
                static_cast<const char*>(view.data) + (dense ? at : offset_of(view, at)) * size,
                size);
    mix(element);
  }
  return hash;
}

}  // namespace fastvit
