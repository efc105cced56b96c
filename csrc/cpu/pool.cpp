// fastvit: per-isa
//
// pool: a sample's tokens -> one row -> head
//
//   token      norm(x[b, 0])
//   avg        norm(mean of x[b, prefix:])
//   norm_avg   mean of norm(x[b, prefix:])
//
// The row is the source functor of the head's product, so without a head it is simply written out.
// Means are summed in f32, a sample per task.

#include "norm.h"
#include "product.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

struct PooledRows {
  const PoolArgs& args;
  const float* norm_weight;
  const float* norm_bias;
  float* room;  // two rows of round_up(D, kLanes) per sample

  template <class Element>
  void operator()(int64_t sample, Element* out) const {
    args.x.dtype == DType::kF32 ? pooled<float>(sample, out) : pooled<bf16>(sample, out);
  }

 private:
  template <class T, class Element>
  void pooled(int64_t sample, Element* out) const {
    const int64_t dim = args.x.size[2], tokens = args.x.size[1];
    const T* x = static_cast<const T*>(args.x.data) + sample * args.x.stride[0];
    if (args.mode == PoolMode::kToken) {
      norm_row(x, dim, args.norm, args.eps, norm_weight, norm_bias, out);
      return;
    }
    const bool norm_first = args.mode == PoolMode::kNormAvg;
    const int64_t padded = round_up(dim, kLanes);
    float* sum = room + sample * 2 * padded;
    float* token = sum + padded;
    for (int64_t j = 0; j < padded; j += kLanes) store(sum + j, zero());
    for (int64_t t = args.num_prefix_tokens; t < tokens; ++t) {
      const Norm norm = norm_first ? args.norm : Norm::kNone;
      norm_row(x + t * args.x.stride[1], dim, norm, args.eps, norm_weight, norm_bias, token);
      for (int64_t j = 0; j < padded; j += kLanes) store(sum + j, load(sum + j) + load(token + j));
    }
    const f32v share = set1(1.0f / static_cast<float>(tokens - args.num_prefix_tokens));
    for (int64_t j = 0; j < padded; j += kLanes) store(sum + j, load(sum + j) * share);
    const Norm norm = norm_first ? Norm::kNone : args.norm;
    norm_row(sum, dim, norm, args.eps, norm_weight, norm_bias, out);
  }
};

struct AddBias {
  Rows out;
  const float* bias;

  void prefetch(int64_t row, int64_t col, Tiles& tiles) const {
    tiles[0] = out.tile(row * out.ld + col, kPanel);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    for (int64_t j = 0; j < cols; j += kLanes) {
      for (int64_t i = 0; i < rows; ++i) {
        const f32v y = load(tile + i * kPanel + j) + load(bias + col + j);
        out.store_at((row + i) * out.ld + col + j, y, cols - j);
      }
    }
  }
};

template <class P>
void run(const PoolArgs& args) {
  const int64_t batch = args.x.size[0], dim = args.x.size[2];
  const int64_t padded = round_up(dim, kLanes);
  const int64_t classes = args.weight ? args.weight->size[0] : dim;
  Vectors vectors(3 + 3 * batch, max(dim, classes));
  const float* norm_weight = vectors.take(args.norm_weight, 0, dim, 1.0f);
  const float* norm_bias = vectors.take(args.norm_bias, 0, dim, 0.0f);
  const float* bias = vectors.take(args.bias, 0, classes, 0.0f);
  float* room = vectors.room(2 * batch * padded);
  const PooledRows source{args, norm_weight, norm_bias, room};
  const Rows out(args.out, args.out.stride[0]);
  if (args.weight) {
    const Weight weight{
        args.weight->data, args.weight->dtype, args.weight->stride[0], classes, dim, false};
    return product<P>(batch, weight, args.num_threads, source, AddBias{out, bias});
  }
  float* rows = vectors.room(batch * padded);
  const ThreadLease lease(args.num_threads);
#pragma omp parallel for num_threads(lease.threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < batch; ++b) {
    float* row = rows + b * padded;
    source(b, row);
    for (int64_t j = 0; j < dim; j += kLanes) {
      out.store_at(b * out.ld + j, load(row + j), dim - j);
    }
  }
}

}  // namespace

void pool(const PoolArgs& args) {
  if (args.x.size[0] == 0) return;
  args.compute == Compute::kBF16 ? run<ProductBF16>(args) : run<ProductF32>(args);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
