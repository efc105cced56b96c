// fastvit: per-isa
//
// quantize_rows: (out, scale) = rows of x, rotated, in int8
//
// For weights: once, by the very code that quantises activations on their way into a product.

#include "quantize.h"

namespace fastvit::cpu::FASTVIT_ISA {

void quantize_rows(const QuantizeArgs& args) {
  const int64_t m = args.x.size[0], k = args.x.size[1];
  const PlainRows source(Rows(args.x, args.x.stride[0]), k);
  auto* out = static_cast<int8_t*>(args.out.data);
  auto* scale = static_cast<float*>(args.scale.data);
  const ThreadLease lease(args.num_threads);
#pragma omp parallel for num_threads(lease.threads) schedule(dynamic, 16)
  for (int64_t row = 0; row < m; ++row) {
    auto* x = static_cast<float*>(
        scratch(Slot::kRow, Rotation(k).padded * static_cast<int64_t>(sizeof(float))));
    source(row, x);
    int8_t* to = out + row * args.out.stride[0];
    scale[row] = quantize_row(x, k, [&](int64_t i, i32v v) { store_bytes(to + i, v); });
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
