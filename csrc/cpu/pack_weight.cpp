// fastvit: per-isa
//
// pack_weight: an int8 weight's panels, kept by whoever keeps the weight: a product need not pack.
//
// For a weight that many short calls share. Floats are never kept packed, as they could be stale.

#include "products.h"
#include "weight.h"

namespace fastvit::cpu::FASTVIT_ISA {

using P = ProductI8;
constexpr int64_t kColumns = P::kWidth * kLanes;

int64_t packed_bytes(int64_t n, int64_t k) {
  return ceil_div(n, kColumns) * panel_elements<P>(k) * static_cast<int64_t>(sizeof(P::Element));
}

void pack_weight(const PackArgs& args) {
  const int64_t n = args.weight.size[0], k = args.weight.size[1];
  const Weight weight{args.weight.data, DType::kI8, args.weight.stride[0], n, k, false};
  auto* panel = static_cast<P::Element*>(args.out.data);
  for (int64_t col = 0; col < n; col += kColumns, panel += panel_elements<P>(k)) {
    pack_panel<P>(weight, col, min(kColumns, n - col), 0, k, panel);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
