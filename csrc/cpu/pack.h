// Packing: B of a product laid out in the order in which the micro-kernel reads it.
//
// A panel holds `vectors` x kLanes columns. Step s of it is one contiguous line of that many 32-bit
// units, a unit being kPair consecutive k of one column (f32: 1, bf16: 2, int8: 4). Packing
// transposes in registers, kLanes columns by kLanes steps at a time, and converts the dtype on the
// way. It costs about as much as 4 to 10 rows of the product, which is why nothing packed is ever
// kept between calls. For products by tiles, whose B tile is 16 steps of 16 columns, zeros fill up
// the last 16 steps.

#pragma once

#include "products.h"

namespace fastvit::cpu::FASTVIT_ISA {

// kLanes columns of a panel. Column j is `rows[j * ld]`, k consecutive elements; columns from
// `count` on are zeros. Step s goes to panel + s * line (in elements). Returns the columns' sums,
// if the product needs them.
template <class P, class T>
static typename P::Accumulator pack_columns(const T* rows, int64_t ld, int64_t count, int64_t k,
                                            typename P::Element* panel, int64_t line) {
  constexpr int64_t kBlock = kLanes * P::kPair;
  typename P::Accumulator sums = {};
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    f32v r[kLanes];
    const int64_t left = k - k0;
    if (count >= kLanes && left >= kBlock) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) r[j] = P::load_steps(rows + j * ld + k0, kBlock);
    } else {
      for (int j = 0; j < kLanes; ++j) {
        r[j] = j < count ? P::load_steps(rows + j * ld + k0, left) : zero();
      }
    }
    transpose(r);
    if constexpr (P::kHasSums) {
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; ++s) sums = P::mac(P::ones(), (typename P::Unit)r[s], sums);
    }
    const int64_t steps = min(kLanes, round_up(ceil_div(left, P::kPair), P::kSteps));
    typename P::Element* out = panel + k0 / P::kPair * line;
    if (steps == kLanes) {
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; ++s) store(reinterpret_cast<float*>(out + s * line), r[s]);
    } else {
      float lines[kLanes][kLanes];
      for (int s = 0; s < kLanes; ++s) store(lines[s], r[s]);
      for (int64_t s = 0; s < steps; ++s) {
        store(reinterpret_cast<float*>(out + s * line), load(lines[s]));
      }
    }
  }
  return sums;
}

template <class P>
static typename P::Accumulator pack_columns(const void* rows, DType dtype, int64_t offset,
                                            int64_t ld, int64_t count, int64_t k,
                                            typename P::Element* panel, int64_t line) {
  if constexpr (P::kQuantized) {
    return pack_columns<P>(static_cast<const int8_t*>(rows) + offset, ld, count, k, panel, line);
  } else if (dtype == DType::kF32) {
    return pack_columns<P>(static_cast<const float*>(rows) + offset, ld, count, k, panel, line);
  } else {
    return pack_columns<P>(static_cast<const bf16*>(rows) + offset, ld, count, k, panel, line);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
