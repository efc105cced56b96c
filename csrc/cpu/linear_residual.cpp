// fastvit: per-isa
//
// linear_residual: out = residual + row_scale[sample] * layer_scale * (x @ weight^T + bias)
//
// Everything after the product is the epilogue. It reads a residual element before it writes the
// output element of the same place, so out may be residual.

#include "norm.h"
#include "product.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

struct AddResidual {
  Rows out, residual;
  const float* bias;
  const float* layer_scale;
  const float* row_scale;  // per sample, or null
  int64_t rows_per_sample;

  void prefetch(int64_t row, int64_t col, TileRows (&tiles)[2]) const {
    tiles[0] = residual.tile(row * residual.ld + col, kPanel);
    tiles[1] = out.tile(row * out.ld + col, kPanel);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    float scale[kRows];
    for (int64_t i = 0; i < rows; ++i) {
      scale[i] = row_scale ? row_scale[(row + i) / rows_per_sample] : 1.0f;
    }
    for (int64_t j = 0; j < cols; j += kLanes) {
      const f32v b = load(bias + col + j), gamma = load(layer_scale + col + j);
      for (int64_t i = 0; i < rows; ++i) {
        const f32v y = (load(tile + i * kPanel + j) + b) * gamma;
        const f32v r = residual.load_at((row + i) * residual.ld + col + j, cols - j);
        out.store_at((row + i) * out.ld + col + j, fmadd(y, set1(scale[i]), r), cols - j);
      }
    }
  }
};

template <class P>
void run(const LinearResidualArgs& args) {
  const int64_t m = args.x.size[0], k = args.x.size[1], n = args.weight.size[0];
  Vectors vectors(2, n);
  const AddResidual epilogue{
      Rows(args.out, args.out.stride[0]),
      Rows(args.residual, args.residual.stride[0]),
      vectors.take(args.bias, 0, n, 0.0f),
      vectors.take(args.layer_scale, 0, n, 1.0f),
      args.row_scale ? static_cast<const float*>(args.row_scale->data) : nullptr,
      args.rows_per_sample};
  const Weight weight{args.weight.data, args.weight.dtype, args.weight.stride[0], n, k, false};
  product<P>(m, weight, args.num_threads, PlainRows(Rows(args.x, args.x.stride[0]), k), epilogue);
}

}  // namespace

void linear_residual(const LinearResidualArgs& args) {
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
