// fastvit: per-isa
//
// norm_linear: out = activation(norm(x) @ weight^T + bias)
//
// The norm is the source functor: a row is normalised once, on its way into packed A. Bias and
// activation are the epilogue, applied to a tile that is still in L1.

#include "epilogues.h"
#include "norm.h"
#include "quantize.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

template <class P>
void run(const NormLinearArgs& args) {
  const int64_t m = args.x.size[0], k = args.x.size[1];
  const bool gated = args.activation == Activation::kSwiglu;
  const int64_t n = gated ? args.weight.size[0] / 2 : args.weight.size[0];

  Vectors vectors(6, max(n, k));
  const float* norm_weight = vectors.take(args.norm_weight, 0, k, 1.0f);
  const float* norm_bias = vectors.take(args.norm_bias, 0, k, 0.0f);
  const float* bias = vectors.take(args.bias, 0, n, 0.0f);

  const Rows out(args.out, args.out.stride[0]);
  const Rows x(args.x, args.x.stride[0]);
  const NormRows source{x, k, args.norm, args.eps, norm_weight, norm_bias};
  const float* value_bias = gated ? vectors.take(args.bias, n, n, 0.0f) : nullptr;
  const Weight weight{args.weight.data,
                      args.weight.dtype,
                      args.weight.stride[0],
                      n,
                      args.weight.size[1],
                      gated,
                      vectors.take_scale(args.weight_scale, args.weight.size[0])};
  with_activation(args.activation, out, bias, value_bias, [&](const auto& epilogue) {
    linear<P>(m, k, weight, args.num_threads, source, epilogue);
  });
}

}  // namespace

void norm_linear(const NormLinearArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
