// fastvit: per-isa
//
// norm_linear: out = activation(norm(x) @ weight^T + bias)
//
// The norm is the source functor: a row is normalised once, on its way into packed A. Bias and
// activation are the epilogue, applied to a tile that is still in L1.

#include "norm.h"
#include "product.h"
#include "vmath.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

template <class Function>
struct Activate {
  Rows out;
  const float* bias;

  void prefetch(int64_t row, int64_t col, TileRows (&tiles)[2]) const {
    tiles[0] = out.tile(row * out.ld + col, kPanel);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    for (int64_t j = 0; j < cols; j += kLanes) {
      const f32v b = load(bias + col + j);
      for (int64_t i = 0; i < rows; ++i) {
        const f32v y = Function::apply(load(tile + i * kPanel + j) + b);
        out.store_at((row + i) * out.ld + col + j, y, cols - j);
      }
    }
  }
};

// The tile holds gates, then (from the next whole vector on) their values.
struct SwiGlu {
  Rows out;
  const float* bias;
  const float* value_bias;

  void prefetch(int64_t row, int64_t col, TileRows (&tiles)[2]) const {
    tiles[0] = out.tile(row * out.ld + col, kPanel / 2);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const float* values = tile + round_up(cols, kLanes);
    for (int64_t j = 0; j < cols; j += kLanes) {
      const f32v b = load(bias + col + j), vb = load(value_bias + col + j);
      for (int64_t i = 0; i < rows; ++i) {
        const f32v gate = Silu::apply(load(tile + i * kPanel + j) + b);
        const f32v value = load(values + i * kPanel + j) + vb;
        out.store_at((row + i) * out.ld + col + j, gate * value, cols - j);
      }
    }
  }
};

template <class P>
void run(const NormLinearArgs& args) {
  const int64_t m = args.x.size[0], k = args.x.size[1];
  const bool gated = args.activation == Activation::kSwiglu;
  const int64_t n = gated ? args.weight.size[0] / 2 : args.weight.size[0];

  Vectors vectors(4, max(n, k));
  const float* norm_weight = vectors.take(args.norm_weight, 0, k, 1.0f);
  const float* norm_bias = vectors.take(args.norm_bias, 0, k, 0.0f);
  const float* bias = vectors.take(args.bias, 0, n, 0.0f);

  const Rows out(args.out, args.out.stride[0]);
  const Rows x(args.x, args.x.stride[0]);
  const NormRows source{x, k, args.norm, args.eps, norm_weight, norm_bias};
  const Weight weight{args.weight.data, args.weight.dtype, args.weight.stride[0], n, k, gated};
  const auto multiply = [&](const auto& epilogue) {
    product<P>(m, weight, args.num_threads, source, epilogue);
  };
  switch (args.activation) {
    case Activation::kNone:
      return multiply(Activate<Identity>{out, bias});
    case Activation::kGelu:
      return multiply(Activate<Gelu>{out, bias});
    case Activation::kGeluTanh:
      return multiply(Activate<GeluTanh>{out, bias});
    case Activation::kQuickGelu:
      return multiply(Activate<QuickGelu>{out, bias});
    case Activation::kSilu:
      return multiply(Activate<Silu>{out, bias});
    case Activation::kRelu:
      return multiply(Activate<Relu>{out, bias});
    case Activation::kSwiglu:
      return multiply(SwiGlu{out, bias, vectors.take(args.bias, n, n, 0.0f)});
  }
}

}  // namespace

void norm_linear(const NormLinearArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
