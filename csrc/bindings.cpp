// fastvit._C: the Python face of csrc. Arguments are trusted: fastvit.ops has checked them.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/machine.h"
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

double peak(const std::string& kind, int num_threads, double seconds) {
  const char* const kinds[] = {"f32", "bf16", "int8"};  // the order of Compute
  for (int i = 0; i < 3; ++i) {
    if (kind == kinds[i]) {
      return cpu::kernels().peak(static_cast<Compute>(i), num_threads, seconds);
    }
  }
  throw std::invalid_argument("kind='" + kind + "' is not a peak; accepted: 'f32', 'bf16', 'int8'");
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

std::vector<std::string> x86_levels(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx,
                                    uint32_t leaf7_edx, uint32_t leaf7_1_eax, uint64_t xcr0,
                                    uint32_t leaf0_ebx) {
  return cpu::levels(
      cpu::X86Words{leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0, leaf0_ebx});
}

std::vector<std::string> arm64_levels(uint64_t hwcap, uint64_t hwcap2) {
  return cpu::levels(cpu::Arm64Words{hwcap, hwcap2});
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

  m.def("fingerprint", &fingerprint, py::arg("tensor"),
        "A hash of a tensor's memory, layout and some elements, which most changes change.");
  m.def("kinds_of", &kinds_of, py::arg("arguments"),
        "What checks of these arguments depend on, as bytes; None where that can't be told.");
  bind_prepared(m);

  m.def("patch_embed", &calls::patch_embed, Release(), py::arg("out"), py::arg("image"),
        py::arg("weight"), py::arg("weight_scale"), py::arg("weight_shift"),
        py::arg("weight_packed"), py::arg("bias"), py::arg("pos_embed"), py::arg("prefix"),
        py::arg("channel_scale"), py::arg("channel_shift"), py::arg("channels_last"),
        py::arg("compute"), py::arg("num_threads"));
  m.def("norm_linear", &calls::norm_linear, Release(), py::arg("out"), py::arg("x"),
        py::arg("weight"), py::arg("weight_scale"), py::arg("bias"), py::arg("norm_weight"),
        py::arg("norm_bias"), py::arg("norm"), py::arg("eps"), py::arg("activation"),
        py::arg("compute"), py::arg("num_threads"));
  m.def("attention", &calls::attention, Release(), py::arg("out"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("bias"), py::arg("scale"), py::arg("compute"),
        py::arg("num_threads"));
  m.def("rotate", &calls::rotate, Release(), py::arg("x"), py::arg("cos"), py::arg("sin"),
        py::arg("interleaved"), py::arg("num_threads"), "Rotary positions, in place.");
  m.def("linear_residual", &calls::linear_residual, Release(), py::arg("out"), py::arg("x"),
        py::arg("weight"), py::arg("weight_scale"), py::arg("bias"), py::arg("residual"),
        py::arg("layer_scale"), py::arg("row_scale"), py::arg("rows_per_sample"),
        py::arg("compute"), py::arg("num_threads"));
  m.def("self_attention", &calls::self_attention, Release(), py::arg("out"), py::arg("x"),
        py::arg("q_weight"), py::arg("q_scale"), py::arg("q_bias"), py::arg("k_weight"),
        py::arg("k_scale"), py::arg("k_bias"), py::arg("v_weight"), py::arg("v_scale"),
        py::arg("v_bias"), py::arg("proj_weight"), py::arg("proj_scale"), py::arg("proj_bias"),
        py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm"), py::arg("eps"),
        py::arg("attn_bias"), py::arg("scale"), py::arg("rope_cos"), py::arg("rope_sin"),
        py::arg("rope_interleaved"), py::arg("layer_scale"), py::arg("row_scale"),
        py::arg("samples"), py::arg("num_heads"), py::arg("compute"), py::arg("num_threads"));
  m.def("mlp", &calls::mlp, Release(), py::arg("out"), py::arg("x"), py::arg("weight1"),
        py::arg("scale1"), py::arg("bias1"), py::arg("weight2"), py::arg("scale2"),
        py::arg("bias2"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm"),
        py::arg("eps"), py::arg("activation"), py::arg("layer_scale"), py::arg("row_scale"),
        py::arg("rows_per_sample"), py::arg("compute"), py::arg("num_threads"));
  m.def("pool", &calls::pool, Release(), py::arg("out"), py::arg("x"), py::arg("mode"),
        py::arg("num_prefix_tokens"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"),
        py::arg("eps"), py::arg("weight"), py::arg("bias"), py::arg("compute"),
        py::arg("num_threads"));
  m.def("quantize_rows", &calls::quantize_rows, Release(), py::arg("out"), py::arg("scale"),
        py::arg("x"), py::arg("num_threads"), "Rotated rows of x in int8, and their scales.");

  m.def("pack_weight", &calls::pack_weight, Release(), py::arg("out"), py::arg("weight"),
        "The panels of an int8 weight (N, K), as products pack them at the present level.");
  m.def(
      "packed_bytes", [](int64_t n, int64_t k) { return cpu::kernels().packed_bytes(n, k); },
      py::arg("n"), py::arg("k"), "How many bytes pack_weight writes.");

  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("supported_isas", &cpu::supported_isas, "Instruction sets of this machine, best last.");
  m.def("set_isa", &cpu::set_isa, py::arg("name"), "Use another supported instruction set.");
  m.def("x86_levels", &x86_levels, py::arg("leaf1_ecx"), py::arg("leaf7_ebx"), py::arg("leaf7_ecx"),
        py::arg("leaf7_edx"), py::arg("leaf7_1_eax"), py::arg("xcr0"), py::arg("leaf0_ebx") = 0,
        "The levels that an x86-64 machine supports, from its CPUID and XCR0 words.");
  m.def("arm64_levels", &arm64_levels, py::arg("hwcap"), py::arg("hwcap2"),
        "The levels that an arm64 machine supports, from its AT_HWCAP and AT_HWCAP2 words.");
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
