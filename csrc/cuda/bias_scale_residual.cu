// Bias, LayerScale (Touvron et al. 2021), DropPath (Huang et al. 2016) and the residual sum after a
// matrix product.

#include "cuda/launch.cuh"

namespace fastvit::cuda {
namespace {

template <int kCount>
__global__ void __launch_bounds__(128) bias_scale_residual_kernel(BiasScaleResidualArgs args) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  if (column >= args.width) return;
  float bias[kCount], layer_scale[kCount];
  load_or(args.bias, column, 0.0f, bias);
  load_or(args.layer_scale, column, 1.0f, layer_scale);

#pragma unroll 1  // unrolled, sm_100 spills
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    float row_scale[1] = {1.0f};
    if (args.row_scale.data != nullptr) {
      // 32 bits hold a row's index; dividing 64 bits is a call that spills.
      const auto sample = static_cast<uint32_t>(row) / static_cast<uint32_t>(args.rows_per_sample);
      load(args.row_scale, sample, row_scale);
    }
    float x[kCount], y[kCount];
    load(args.x, row * args.x_stride + column, x);
    load(args.residual, row * args.residual_stride + column, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] += row_scale[0] * layer_scale[i] * (x[i] + bias[i]);
    store(args.out, row * args.out_stride + column, y);
  }
}

}  // namespace

void bias_scale_residual(const BiasScaleResidualArgs& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return;
  const bool whole = args.width % kVector == 0 && is_vectorisable(args.x, args.x_stride) &&
                     is_vectorisable(args.out, args.out_stride) &&
                     is_vectorisable(args.residual, args.residual_stride) &&
                     is_vectorisable(args.bias, 0) && is_vectorisable(args.layer_scale, 0);
  const ColumnGrid grid = column_grid(args.rows, whole ? args.width / kVector : args.width);
  launch(whole ? bias_scale_residual_kernel<kVector> : bias_scale_residual_kernel<1>, grid.blocks,
         grid.threads, stream, args, "bias_scale_residual");
}

}  // namespace fastvit::cuda
