// The pointwise halves of norm_linear and linear_residual, to stand around a library's matrix
// product (cuBLAS) where Triton is absent: normalise before it, bias and activation or bias,
// LayerScale, DropPath and residual after it. Each is one pass over memory.
//
// Arguments are trusted and data lies on the current device. Elements are f32, bf16 or f16, each
// array its own; arithmetic is f32. Every launch goes to `stream` and returns at once; a failed
// launch throws std::runtime_error.

#pragma once

#include <cstdint>

#include "cpu/types.h"

struct CUstream_st;

namespace fastvit::cuda {

// Continues fastvit::DType: the CPU has no kernels in half precision.
constexpr DType kF16 = static_cast<DType>(3);

using Stream = CUstream_st*;  // cudaStream_t

// Elements in device memory, contiguous along the last dimension; null data: absent.
struct Array {
  void* data = nullptr;
  DType dtype = DType::kF32;
};

struct NormArgs {
  Array out;    // (rows, width)
  Array x;      // (rows, width)
  Array scale;  // (width) or absent
  Array shift;  // (width) or absent
  float* mean;  // (rows) or null: the statistics, for a backward or a folded product
  float* rstd;  // (rows) or null
  int64_t rows, width;
  int64_t out_stride, x_stride;  // elements from one row to the next
  float eps;
  bool centre;  // LayerNorm; otherwise RMSNorm, whose mean is 0
};

// out = (x - mean) * rstd * scale + shift with exact two-pass statistics.
void norm(const NormArgs& args, Stream stream);

struct BiasActArgs {
  Array out;   // (rows, width), may be x itself
  Array x;     // (rows, width), or (rows, 2 * width) for swiglu: [gate; value]
  Array bias;  // as wide as x, or absent
  int64_t rows, width;
  int64_t out_stride, x_stride;
  Activation activation;
};

// out = activation(x + bias).
void bias_act(const BiasActArgs& args, Stream stream);

struct BiasScaleResidualArgs {
  Array out;          // (rows, width), may be residual or x itself
  Array x;            // (rows, width)
  Array residual;     // (rows, width)
  Array bias;         // (width) or absent
  Array layer_scale;  // (width) or absent
  Array row_scale;    // (rows / rows_per_sample) or absent: DropPath's factor
  int64_t rows, width, rows_per_sample;
  int64_t out_stride, x_stride, residual_stride;
};

// out = residual + row_scale * layer_scale * (x + bias).
void bias_scale_residual(const BiasScaleResidualArgs& args, Stream stream);

}  // namespace fastvit::cuda
