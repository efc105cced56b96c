// The module `cuda_on_host`: csrc/cuda as it is, compiled against the headers beside this file.

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace py = pybind11;

namespace fastvit::cuda {
void bind(py::module_& module);
}

PYBIND11_MODULE(cuda_on_host, m) {
  py::class_<fastvit::View>(m, "View", py::module_local());
  m.def("view", &fastvit::view_of);
  fastvit::cuda::bind(m);
}
