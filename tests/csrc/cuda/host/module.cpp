// The module `cuda_on_host`: csrc/cuda as it is, compiled against the headers beside this file.

#include <pybind11/pybind11.h>

#include "cpu/types.h"

namespace py = pybind11;

namespace fastvit::cuda {
void bind(py::module_& module);
}

PYBIND11_MODULE(cuda_on_host, m) {
  py::class_<fastvit::View>(m, "View", py::module_local())
      .def(
          py::init([](uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides) {
            fastvit::View view{};
            view.data = reinterpret_cast<void*>(data);
            view.dtype = static_cast<fastvit::DType>(dtype);
            view.ndim = static_cast<int>(sizes.size());
            for (int i = 0; i < view.ndim; ++i) {
              view.size[i] = sizes[i].cast<int64_t>();
              view.stride[i] = strides[i].cast<int64_t>();
            }
            return view;
          }));
  fastvit::cuda::bind(m);
}
