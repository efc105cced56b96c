#include "tensor.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastvit {
namespace {

// Attribute names and dtypes that live as long as the process.
struct Torch {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtypes[3];

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "bfloat16", "uint8"};  // in the order of DType
    for (int i = 0; i < 3; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
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

View make_view(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides) {
  if (sizes.size() > kMaxDims || sizes.size() != strides.size()) {
    throw std::invalid_argument("View: sizes and strides must have equal length, at most " +
                                std::to_string(kMaxDims));
  }
  View view{};
  view.data = reinterpret_cast<void*>(data);
  view.dtype = static_cast<DType>(dtype);
  view.ndim = static_cast<int>(sizes.size());
  read_tuple(sizes, view.size);
  read_tuple(strides, view.stride);
  return view;
}

View view_of(py::handle tensor) {
  static const Torch& torch = *new Torch;
  PyObject* t = tensor.ptr();
  const py::object dtype = checked(PyObject_GetAttr(t, torch.dtype));
  int code = 0;
  while (code < 3 && torch.dtypes[code] != dtype.ptr()) ++code;
  if (code == 3) {
    throw std::invalid_argument("dtype " + std::string(py::str(dtype)) +
                                " is not accepted; accepted: float32, bfloat16, uint8");
  }
  const py::object data = checked(PyObject_CallMethodNoArgs(t, torch.data_ptr));
  return make_view(PyLong_AsSize_t(data.ptr()), code, checked(PyObject_GetAttr(t, torch.shape)),
                   checked(PyObject_CallMethodNoArgs(t, torch.stride)));
}

}  // namespace fastvit
