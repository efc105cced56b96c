// self_attention: out = x + row_scale * layer_scale * proj(attention(qkv(norm(x))))
//
// Three operators in a row, over as many samples at a time as keep q, k, v and the heads in a share
// of L3. They are scratch that stays with the thread: a fresh tensor costs a page fault each 4 KiB.

#include "dispatch.h"
#include "runtime.h"

namespace fastvit::cpu {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

View matrix(void* data, DType dtype, int64_t rows, int64_t columns, int64_t ld) {
  return {data, dtype, 2, {rows, columns}, {ld, 1}};
}

// The elements of a view from `offset` on; its sizes stay.
View shifted(const View& view, int64_t offset) {
  View from = view;
  from.data = static_cast<char*>(view.data) + offset * element_bytes(view.dtype);
  return from;
}

}  // namespace

void self_attention(const SelfAttentionArgs& args) {
  if (args.samples == 0 || args.x.size[0] == 0) return;
  const Kernels& run = kernels();
  const DType dtype = args.compute == Compute::kBF16 ? DType::kBF16 : DType::kF32;
  const int64_t tokens = args.x.size[0] / args.samples;
  const int64_t inner = args.weights[0]->size[0] * args.projections / 3;
  const int64_t head_dim = inner / args.num_heads;

  const int64_t sample_elements = tokens * 4 * inner;
  const int64_t budget = cache_sizes().l3 / 2 < (16 << 20) ? cache_sizes().l3 / 2 : 16 << 20;
  const int64_t fit = budget / (sample_elements * element_bytes(dtype));
  const int64_t most = fit < 1 ? 1 : fit;
  const int64_t groups = (args.samples + most - 1) / most;
  const int64_t group = (args.samples + groups - 1) / groups;
  auto* qkv =
      static_cast<char*>(scratch(Slot::kHidden, group * sample_elements * element_bytes(dtype)));
  char* heads = qkv + group * tokens * 3 * inner * element_bytes(dtype);

  for (int64_t first = 0; first < args.samples; first += group) {
    const int64_t samples = group < args.samples - first ? group : args.samples - first;
    const int64_t row = first * tokens, rows = samples * tokens;
    View x = shifted(args.x, row * args.x.stride[0]);
    View out = shifted(args.out, row * args.out.stride[0]);
    x.size[0] = out.size[0] = rows;

    // One packed projection, or q, k and v, each into its third of a row.
    for (int64_t i = 0; i < args.projections; ++i) {
      const View third = shifted({qkv, dtype, 0, {}, {}}, i * inner);
      run.norm_linear({matrix(third.data, dtype, rows, args.weights[i]->size[0], 3 * inner), x,
                       *args.weights[i], args.scales[i], args.biases[i], args.norm_weight,
                       args.norm_bias, args.norm, args.eps, Activation::kNone, args.compute,
                       args.num_threads});
    }

    View slices[3];
    for (int64_t i = 0; i < 3; ++i) {
      slices[i] = shifted({qkv,
                           dtype,
                           4,
                           {samples, tokens, args.num_heads, head_dim},
                           {tokens * 3 * inner, 3 * inner, head_dim, 1}},
                          i * inner);
    }
    const View attended{heads,
                        dtype,
                        4,
                        {samples, tokens, args.num_heads, head_dim},
                        {tokens * inner, inner, head_dim, 1}};
    View mask;
    if (args.attn_bias) mask = shifted(*args.attn_bias, first * args.attn_bias->stride[0]);
    run.attention({attended, slices[0], slices[1], slices[2], args.attn_bias ? &mask : nullptr,
                   args.scale, args.compute, args.num_threads});

    View row_scale;
    if (args.row_scale) row_scale = shifted(*args.row_scale, first);
    run.linear_residual({out, matrix(heads, dtype, rows, inner, inner), args.proj_weight, x,
                         args.proj_scale, args.proj_bias, args.layer_scale,
                         args.row_scale ? &row_scale : nullptr, tokens, args.compute,
                         args.num_threads});
  }
}

}  // namespace fastvit::cpu
