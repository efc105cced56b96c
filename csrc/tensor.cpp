#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastvit {
namespace {

constexpr int kDTypes = 5;

// Attribute names and dtypes that live as long as the process.
struct Torch {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtypes[kDTypes];

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    // The order of DType, with float16 from cuda/kernels.h.
    const char* names[] = {"float32", "bfloat16", "uint8", "float16", "int8"};
    for (int i = 0; i < kDTypes; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
  }
};

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void read_tuple(const py::object& source, int64_t* out) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(source.ptr()); ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
  }
}

}  // namespace

View view_of(py::handle tensor) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> once;
  const Torch& torch = once.call_once_and_store_result([] { return Torch(); }).get_stored();
  PyObject* t = tensor.ptr();
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
  View view{};
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

uint64_t fingerprint(const View& view) {
  constexpr int64_t kSamples = 64;
  const int64_t size = view.dtype == DType::kF32                              ? 4
                       : view.dtype == DType::kU8 || view.dtype == DType::kI8 ? 1
                                                                              : 2;
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i) count *= view.size[i];
  const int64_t samples = count < kSamples ? count : kSamples;
  uint64_t hash = 0;
  for (int64_t i = 0; i < samples; ++i) {
    // The odd term keeps the samples of a matrix out of one column.
    const int64_t at = (count / samples * i + 7 * i) % count;
    uint64_t element = 0;
    std::memcpy(&element, static_cast<const char*>(view.data) + at * size, size);
    hash = (hash ^ element) * 0x9e3779b97f4a7c15U;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace fastvit
