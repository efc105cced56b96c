// The Python face of csrc/cuda: bindings.cpp calls bind() under FASTVIT_WITH_CUDA.
//
// Tensors have two dimensions and unit last stride (vectors: contiguous), are of f32, bf16 or f16,
// and lie on the current device; `stream` is torch.cuda.Stream.cuda_stream.

#include <pybind11/pybind11.h>

#include "cuda/kernels.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastvit::cuda {
namespace {

Array array(const View* view) {
  if (view == nullptr) return {};
  return {view->data, view->dtype};
}

float* floats(const View* view) {
  return view == nullptr ? nullptr : static_cast<float*>(view->data);
}

Stream handle(uintptr_t stream) { return reinterpret_cast<Stream>(stream); }

void norm_py(const View& out, const View& x, const View* weight, const View* bias, const View* mean,
             const View* rstd, int kind, float eps, uintptr_t stream) {
  norm({array(&out), array(&x), array(weight), array(bias), floats(mean), floats(rstd), x.size[0],
        x.size[1], out.stride[0], x.stride[0], eps, static_cast<Norm>(kind) == Norm::kLayer},
       handle(stream));
}

void bias_act_py(const View& out, const View& x, const View* bias, int activation,
                 uintptr_t stream) {
  bias_act({array(&out), array(&x), array(bias), out.size[0], out.size[1], out.stride[0],
            x.stride[0], static_cast<Activation>(activation)},
           handle(stream));
}

void bias_scale_residual_py(const View& out, const View& x, const View* bias, const View& residual,
                            const View* layer_scale, const View* row_scale, int64_t rows_per_sample,
                            uintptr_t stream) {
  bias_scale_residual(
      {array(&out), array(&x), array(&residual), array(bias), array(layer_scale), array(row_scale),
       out.size[0], out.size[1], rows_per_sample, out.stride[0], x.stride[0], residual.stride[0]},
      handle(stream));
}

}  // namespace

void bind(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def(
      "cuda_norm", &norm_py, Release(), py::arg("out"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("mean"), py::arg("rstd"), py::arg("norm"), py::arg("eps"),
      py::arg("stream"),
      "out (M, K) = norm(x (M, K)) * weight (K) + bias (K); norm 1 layer, 2 rms; mean, rstd: "
      "f32 (M) or None.");
  module.def(
      "cuda_bias_act", &bias_act_py, Release(), py::arg("out"), py::arg("x"), py::arg("bias"),
      py::arg("activation"), py::arg("stream"),
      "out (M, N) = activation(x + bias); x (M, N), or (M, 2 N) for swiglu. May be in place.");
  module.def("cuda_bias_scale_residual", &bias_scale_residual_py, Release(), py::arg("out"),
             py::arg("x"), py::arg("bias"), py::arg("residual"), py::arg("layer_scale"),
             py::arg("row_scale"), py::arg("rows_per_sample"), py::arg("stream"),
             "out (M, N) = residual + row_scale * layer_scale * (x + bias). May be in place.");
}

}  // namespace fastvit::cuda
