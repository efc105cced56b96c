// fastvit: per-isa
//
// mlp: out = x + row_scale * layer_scale * (activation(norm(x) @ weight1^T + bias1) @ weight2^T +
//            bias2)
//
//   for each block of rows                 as many as keep the hidden rows in a share of L3
//     product: norm in, activation out     written as the packed rows of the next product's A
//     product: packed rows in, residual out   or, for an int8 weight, rows in
//
// The hidden activations, four times as wide as x, are scratch that stays with the thread: writing
// them to a fresh tensor costs a page fault each 4 KiB, and reading them back another packing.

#include "epilogues.h"
#include "norm.h"
#include "quantize.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

template <class P>
void run(const MlpArgs& args) {
  using Element = typename P::Element;
  const int64_t m = args.x.size[0], k = args.x.size[1], n = args.weight2.size[0];
  const int64_t hidden = args.hidden;
  const bool gated = args.activation == Activation::kSwiglu;

  Vectors vectors(9, max(max(hidden, k), n));
  const Weight first{args.weight1.data,
                     args.weight1.dtype,
                     args.weight1.stride[0],
                     hidden,
                     args.weight1.size[1],
                     gated,
                     vectors.take_scale(args.scale1, args.weight1.size[0])};
  const Weight second{args.weight2.data,
                      args.weight2.dtype,
                      args.weight2.stride[0],
                      n,
                      args.weight2.size[1],
                      false,
                      vectors.take_scale(args.scale2, n)};
  const Rows x(args.x, args.x.stride[0]), out(args.out, args.out.stride[0]);
  NormRows source{x,
                  k,
                  args.norm,
                  args.eps,
                  vectors.take(args.norm_weight, 0, k, 1.0f),
                  vectors.take(args.norm_bias, 0, k, 0.0f)};
  AddResidual add{out,
                  x,
                  vectors.take(args.bias2, 0, n, 0.0f),
                  vectors.take(args.layer_scale, 0, n, 1.0f),
                  args.row_scale ? static_cast<const float*>(args.row_scale->data) : nullptr,
                  args.rows_per_sample};
  const float* bias = vectors.take(args.bias1, 0, hidden, 0.0f);
  const float* value_bias = gated ? vectors.take(args.bias1, hidden, hidden, 0.0f) : nullptr;

  const int64_t block = packed_rows<P>(max(m, 1), hidden), ld = packed_ld<P>(hidden);
  auto* packed = static_cast<Element*>(scratch(Slot::kHidden, block * ld * sizeof(Element)));
  for (int64_t row = 0; row < block; ++row) pad_row<P>(packed + row * ld, hidden);
  for (int64_t row = 0; row < m; row += block) {
    const int64_t rows = min(block, m - row);
    source.x = x.from(row);
    add.residual = x.from(row);
    add.out = out.from(row);
    add.first_row = row;
    const Rows between(packed, kDTypeOf<P>, ld);
    with_activation(args.activation, between, bias, value_bias, [&](const auto& epilogue) {
      linear<P>(rows, k, first, args.num_threads, source, epilogue);
    });
    if (second.dtype == DType::kI8) {
      linear<P>(rows, hidden, second, args.num_threads, PlainRows(between, hidden), add);
    } else {
      product<P>(rows, second, args.num_threads, PackedRows<P>{packed, ld}, add);
    }
  }
}

}  // namespace

void mlp(const MlpArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
