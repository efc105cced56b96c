// The additive bias of attention.

#pragma once

#include "rows.h"

namespace fastvit::cpu::FASTVIT_ISA {

// Additive bias of one head, broadcast through its strides.
struct Bias {
  const View* view;
  int64_t offset;

  Bias(const View* bias, int64_t sample, int64_t head)
      : view(bias), offset(bias ? sample * bias->stride[0] + head * bias->stride[1] : 0) {}

  // score = score * scale + bias for keys k0 .. k0 + keys of one query row.
  void apply(float* score, int64_t query, int64_t k0, int64_t keys, float scale) const {
    const int64_t step = view->stride[3];
    const int64_t begin = offset + query * view->stride[2] + k0 * step;
    const Rows source(*view, 0);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const int64_t n = min(kLanes, keys - j);
      f32v b;
      if (step == 1) {
        b = source.load_at(begin + j, n);
      } else {
        float gathered[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = begin + (j + i) * step;
          gathered[i] = source.dtype == DType::kF32
                            ? static_cast<const float*>(source.data)[at]
                            : to_f32(static_cast<const bf16*>(source.data)[at]);
        }
        b = load(gathered);
      }
      store(score + j, fmadd(load(score + j), set1(scale), b));
    }
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
