// The module `cuda_on_host`: csrc/cuda as it is, compiled against the headers beside this file.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fastvit::cuda {
void bind(py::module_& module);
}

PYBIND11_MODULE(cuda_on_host, m) { fastvit::cuda::bind(m); }
