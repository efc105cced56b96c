// Bias and activation after a matrix product, in place if wanted.

#include "cuda/activation.cuh"
#include "cuda/launch.cuh"

namespace fastvit::cuda {
namespace {

template <Activation kActivation, int kCount>
__global__ void __launch_bounds__(128) bias_act_kernel(BiasActArgs args) {
  constexpr bool kGated = kActivation == Activation::kSwiglu;
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  if (column >= args.width) return;
  float bias[kCount], value_bias[kCount];
  load_or(args.bias, column, 0.0f, bias);
  if constexpr (kGated) load_or(args.bias, args.width + column, 0.0f, value_bias);

  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    float y[kCount];
    load(args.x, row * args.x_stride + column, y);
    if constexpr (kGated) {
      float value[kCount];
      load(args.x, row * args.x_stride + args.width + column, value);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = silu(y[i] + bias[i]) * (value[i] + value_bias[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = activate<kActivation>(y[i] + bias[i]);
    }
    store(args.out, row * args.out_stride + column, y);
  }
}

template <int kCount>
void (*kernel_for(Activation activation))(BiasActArgs) {
  switch (activation) {
    case Activation::kNone:
      return bias_act_kernel<Activation::kNone, kCount>;
    case Activation::kGelu:
      return bias_act_kernel<Activation::kGelu, kCount>;
    case Activation::kGeluTanh:
      return bias_act_kernel<Activation::kGeluTanh, kCount>;
    case Activation::kQuickGelu:
      return bias_act_kernel<Activation::kQuickGelu, kCount>;
    case Activation::kSilu:
      return bias_act_kernel<Activation::kSilu, kCount>;
    case Activation::kRelu:
      return bias_act_kernel<Activation::kRelu, kCount>;
    case Activation::kSwiglu:
      return bias_act_kernel<Activation::kSwiglu, kCount>;
  }
  throw std::invalid_argument("activation: not one of fastvit::Activation");
}

}  // namespace

void bias_act(const BiasActArgs& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return;
  // A width of whole vectors keeps the second half of a gated row aligned too.
  const bool whole = args.width % kVector == 0 && is_vectorisable(args.x, args.x_stride) &&
                     is_vectorisable(args.out, args.out_stride) && is_vectorisable(args.bias, 0);
  const ColumnGrid grid = column_grid(args.rows, whole ? args.width / kVector : args.width);
  launch(whole ? kernel_for<kVector>(args.activation) : kernel_for<1>(args.activation), grid.blocks,
         grid.threads, stream, args, "bias_act");
}

}  // namespace fastvit::cuda
