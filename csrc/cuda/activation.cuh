// The activations of MLPs. Exact forms: the kernels around them wait for memory, not arithmetic.

#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace fastvit::cuda {

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // 0.5 (1 + tanh(u)) is sigmoid(2 u).
    return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return x / (1.0f + expf(-1.702f * x));
  } else if constexpr (kActivation == Activation::kSilu) {
    return silu(x);
  } else if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0f ? 0.0f : x;  // in this order NaN stays NaN
  } else {
    return x;
  }
}

}  // namespace fastvit::cuda
