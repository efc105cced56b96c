// fastvit: per-isa
//
// linear_residual: out = residual + row_scale[sample] * layer_scale * (x @ weight^T + bias)
//
// Everything after the product is the epilogue. Rows of the product's dtype are read where they
// lie, unless they collide in L1: a copy costs 5 % of a product of 768 columns.

#include "epilogues.h"
#include "norm.h"
#include "quantize.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

template <class P>
void run(const LinearResidualArgs& args) {
  const int64_t m = args.x.size[0], k = args.x.size[1], n = args.weight.size[0];
  Vectors vectors(3, n);
  const AddResidual epilogue{
      Rows(args.out, args.out.stride[0]),
      Rows(args.residual, args.residual.stride[0]),
      vectors.take(args.bias, 0, n, 0.0f),
      vectors.take(args.layer_scale, 0, n, 1.0f),
      args.row_scale ? static_cast<const float*>(args.row_scale->data) : nullptr,
      args.rows_per_sample};
  const Weight weight{args.weight.data,
                      args.weight.dtype,
                      args.weight.stride[0],
                      n,
                      args.weight.size[1],
                      false,
                      vectors.take_scale(args.weight_scale, n)};
  constexpr int64_t kSize = sizeof(typename P::Element);
  const bool packed = !P::kTiles && args.x.dtype == kDTypeOf<P> && k % P::kPair == 0 &&
                      !rows_collide<P>(args.x.stride[0] * kSize);
  if (packed && weight.dtype != DType::kI8) {
    const auto* rows = static_cast<const typename P::Element*>(args.x.data);
    return product<P>(m, weight, args.num_threads, PackedRows<P>{rows, args.x.stride[0]}, epilogue);
  }
  const PlainRows source(Rows(args.x, args.x.stride[0]), k);
  linear<P>(m, k, weight, args.num_threads, source, epilogue);
}

}  // namespace

void linear_residual(const LinearResidualArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
