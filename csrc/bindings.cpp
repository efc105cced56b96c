// fastvit._C: the Python face of csrc. Arguments are trusted: fastvit.ops has checked them.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/runtime.h"
#include "cpu/types.h"
#include "prepared.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastvit {

#ifdef FASTVIT_WITH_CUDA
namespace cuda {
void bind(py::module_& module);
}
#endif

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void patch_embed(const View& out, const View& image, const View& weight, const View* bias,
                 const View* pos_embed, const View* prefix, const View* channel_scale,
                 const View* channel_shift, int compute, int num_threads) {
  cpu::kernels().patch_embed({out, image, weight, bias, pos_embed, prefix, channel_scale,
                              channel_shift, static_cast<Compute>(compute), num_threads});
}

void norm_linear(const View& out, const View& x, const View& weight, const View* bias,
                 const View* norm_weight, const View* norm_bias, int norm, float eps,
                 int activation, int compute, int num_threads) {
  cpu::kernels().norm_linear({out, x, weight, bias, norm_weight, norm_bias, static_cast<Norm>(norm),
                              eps, static_cast<Activation>(activation),
                              static_cast<Compute>(compute), num_threads});
}

void attention(const View& out, const View& q, const View& k, const View& v, const View* bias,
               float scale, int compute, int num_threads) {
  cpu::kernels().attention({out, q, k, v, bias, scale, static_cast<Compute>(compute), num_threads});
}

void linear_residual(const View& out, const View& x, const View& weight, const View* bias,
                     const View& residual, const View* layer_scale, const View* row_scale,
                     int64_t rows_per_sample, int compute, int num_threads) {
  cpu::kernels().linear_residual({out, x, weight, residual, bias, layer_scale, row_scale,
                                  rows_per_sample, static_cast<Compute>(compute), num_threads});
}

void self_attention(const View& out, const View& x, const View& q_weight, const View* q_bias,
                    const View* k_weight, const View* k_bias, const View* v_weight,
                    const View* v_bias, const View& proj_weight, const View* proj_bias,
                    const View* norm_weight, const View* norm_bias, int norm, float eps,
                    const View* attn_bias, float scale, const View* layer_scale,
                    const View* row_scale, int64_t samples, int64_t num_heads, int compute,
                    int num_threads) {
  cpu::self_attention({out,
                       x,
                       {&q_weight, k_weight, v_weight},
                       {q_bias, k_bias, v_bias},
                       k_weight ? 3 : 1,
                       proj_weight,
                       proj_bias,
                       norm_weight,
                       norm_bias,
                       static_cast<Norm>(norm),
                       eps,
                       attn_bias,
                       scale,
                       layer_scale,
                       row_scale,
                       samples,
                       num_heads,
                       static_cast<Compute>(compute),
                       num_threads});
}

void mlp(const View& out, const View& x, const View& weight1, const View* bias1,
         const View& weight2, const View* bias2, const View* norm_weight, const View* norm_bias,
         int norm, float eps, int activation, const View* layer_scale, const View* row_scale,
         int64_t rows_per_sample, int compute, int num_threads) {
  cpu::kernels().mlp({out, x, weight1, weight2, bias1, bias2, norm_weight, norm_bias,
                      static_cast<Norm>(norm), eps, static_cast<Activation>(activation),
                      layer_scale, row_scale, rows_per_sample, static_cast<Compute>(compute),
                      num_threads});
}

void pool(const View& out, const View& x, int mode, int64_t num_prefix_tokens, int norm,
          const View* norm_weight, const View* norm_bias, float eps, const View* weight,
          const View* bias, int compute, int num_threads) {
  cpu::kernels().pool({out, x, static_cast<PoolMode>(mode), num_prefix_tokens,
                       static_cast<Norm>(norm), norm_weight, norm_bias, eps, weight, bias,
                       static_cast<Compute>(compute), num_threads});
}

double peak(const std::string& kind, int num_threads, double seconds) {
  if (kind != "f32" && kind != "bf16") {
    throw std::invalid_argument("kind='" + kind + "' is not a peak; accepted: 'f32', 'bf16'");
  }
  return cpu::kernels().peak(kind == "bf16" ? Compute::kBF16 : Compute::kF32, num_threads, seconds);
}

// GB/s read plus written by copying buffers far larger than the caches; the best of the passes.
double copy_bandwidth(int num_threads, double seconds) {
  const cpu::ThreadLease lease(num_threads);
  const int threads = lease.threads;
  const size_t bytes = size_t{64} << 20, share = bytes / threads;
  const std::unique_ptr<char[]> from(new char[bytes]()), to(new char[bytes]());
  const double end = cpu::seconds_now() + seconds;
  double best = 0;
  do {
    const double begin = cpu::seconds_now();
#pragma omp parallel num_threads(threads)
    {
      const size_t offset = FASTVIT_THREAD_INDEX * share;
      std::memcpy(to.get() + offset, from.get() + offset, share);
    }
    const double rate =
        2.0 * static_cast<double>(share) * threads / (cpu::seconds_now() - begin) / 1e9;
    if (rate > best) best = rate;
  } while (cpu::seconds_now() < end);
  return best;
}

py::dict omp_info() {
  py::dict info;
  info["max_threads"] = 1;
  info["path"] = py::none();
#ifdef _OPENMP
  info["max_threads"] = omp_get_max_threads();
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &library) != 0) {
    info["path"] = library.dli_fname;
  }
#endif
  return info;
}

py::dict leased_threads() {
  const cpu::LeasedThreads leased = cpu::leased_threads();
  py::dict counts;
  counts["now"] = leased.now;
  counts["most"] = leased.most;
  return counts;
}

bool cuda_compiled() {
#ifdef FASTVIT_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastvit's compiled kernels. Use fastvit.ops, which checks arguments.";

  py::class_<View>(m, "View", py::module_local(),
                   "A strided array owned by the caller; strides count elements.");
  m.def("view", &view_of, py::arg("tensor"), "A torch tensor as a View.");
  bind_prepared(m);

  m.def("patch_embed", &patch_embed, Release(), py::arg("out"), py::arg("image"), py::arg("weight"),
        py::arg("bias"), py::arg("pos_embed"), py::arg("prefix"), py::arg("channel_scale"),
        py::arg("channel_shift"), py::arg("compute"), py::arg("num_threads"));
  m.def("norm_linear", &norm_linear, Release(), py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm"),
        py::arg("eps"), py::arg("activation"), py::arg("compute"), py::arg("num_threads"));
  m.def("attention", &attention, Release(), py::arg("out"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("bias"), py::arg("scale"), py::arg("compute"),
        py::arg("num_threads"));
  m.def("linear_residual", &linear_residual, Release(), py::arg("out"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("layer_scale"),
        py::arg("row_scale"), py::arg("rows_per_sample"), py::arg("compute"),
        py::arg("num_threads"));
  m.def("self_attention", &self_attention, Release(), py::arg("out"), py::arg("x"),
        py::arg("q_weight"), py::arg("q_bias"), py::arg("k_weight"), py::arg("k_bias"),
        py::arg("v_weight"), py::arg("v_bias"), py::arg("proj_weight"), py::arg("proj_bias"),
        py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm"), py::arg("eps"),
        py::arg("attn_bias"), py::arg("scale"), py::arg("layer_scale"), py::arg("row_scale"),
        py::arg("samples"), py::arg("num_heads"), py::arg("compute"), py::arg("num_threads"));
  m.def("mlp", &mlp, Release(), py::arg("out"), py::arg("x"), py::arg("weight1"), py::arg("bias1"),
        py::arg("weight2"), py::arg("bias2"), py::arg("norm_weight"), py::arg("norm_bias"),
        py::arg("norm"), py::arg("eps"), py::arg("activation"), py::arg("layer_scale"),
        py::arg("row_scale"), py::arg("rows_per_sample"), py::arg("compute"),
        py::arg("num_threads"));
  m.def("pool", &pool, Release(), py::arg("out"), py::arg("x"), py::arg("mode"),
        py::arg("num_prefix_tokens"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"),
        py::arg("eps"), py::arg("weight"), py::arg("bias"), py::arg("compute"),
        py::arg("num_threads"));

  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("supported_isas", &cpu::supported_isas, "Instruction sets of this machine, best last.");
  m.def("set_isa", &cpu::set_isa, py::arg("name"), "Use another supported instruction set.");
  m.def("omp_info", &omp_info, "The OpenMP runtime: its thread limit and the library's path.");
  m.def("leased_threads", &leased_threads,
        "Threads that kernels run on now, and the most at any one time since the last call.");
  m.def("peak", &peak, Release(), py::arg("kind"), py::arg("num_threads"), py::arg("seconds"),
        "GFLOP/s of register-only multiply-accumulate loops at the current instruction set.");
  m.def("copy_bandwidth", &copy_bandwidth, Release(), py::arg("num_threads"), py::arg("seconds"),
        "GB/s (read plus written) of copying memory.");
  m.def("cuda_compiled", &cuda_compiled);
#ifdef FASTVIT_WITH_CUDA
  cuda::bind(m);
#endif
}

}  // namespace fastvit
