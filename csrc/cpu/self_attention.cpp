// self_attention: out = x + row_scale * layer_scale * proj(attention(qkv(norm(x))))
//
// Three operators in a row, and before the second one the rotation of q and k where they have
// rotary positions, over as many samples at a time as keep q, k, v and the heads in a share of L3.
// They are scratch that stays with the thread: a fresh tensor costs a page fault each 4 KiB.
//
// Where only the first tokens of a sample are wanted, these are copied to out, and are the source
// of q and the residual from there; k and v come from all tokens.

#include <cstring>

#include "dispatch.h"
#include "runtime.h"

namespace fastvit::cpu {
namespace {

int64_t element_bytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1;
}

View matrix(void* data, DType dtype, int64_t rows, int64_t columns, int64_t ld) {
  return {data, dtype, 2, {rows, columns}, {ld, 1}};
}

// The elements of a view from `offset` on; its sizes stay.
View shifted(const View& view, int64_t offset) {
  View from = view;
  from.data = static_cast<char*>(view.data) + offset * element_bytes(view.dtype);
  return from;
}

// Rows first .. first + count of a matrix, or of a vector.
View rows_of(const View& view, int64_t first, int64_t count) {
  View some = shifted(view, first * view.stride[0]);
  some.size[0] = count;
  return some;
}

// A projection's linear: its rows first .. first + count.
struct Linear {
  View weight, scale, bias;
  bool has_scale, has_bias;

  Linear(const SelfAttentionArgs& args, int64_t i, int64_t first, int64_t count)
      : weight(rows_of(*args.weights[i], first, count)),
        has_scale(args.scales[i] != nullptr),
        has_bias(args.biases[i] != nullptr) {
    if (has_scale) scale = rows_of(*args.scales[i], first, count);
    if (has_bias) bias = rows_of(*args.biases[i], first, count);
  }

  void run(const SelfAttentionArgs& args, const View& out, const View& x) const {
    kernels().norm_linear({out, x, weight, has_scale ? &scale : nullptr, has_bias ? &bias : nullptr,
                           args.norm_weight, args.norm_bias, args.norm, args.eps, Activation::kNone,
                           args.compute, args.num_threads});
  }
};

}  // namespace

void self_attention(const SelfAttentionArgs& args) {
  if (args.samples == 0 || args.x.size[0] == 0) return;
  const Kernels& run = kernels();
  const DType dtype = args.compute == Compute::kBF16 ? DType::kBF16 : DType::kF32;
  const int64_t tokens = args.x.size[0] / args.samples;
  const bool some = args.queries > 0 && args.queries < tokens;
  const int64_t queries = some ? args.queries : tokens;
  const int64_t inner = args.weights[0]->size[0] * args.projections / 3;
  const int64_t head_dim = inner / args.num_heads;

  const int64_t sample_elements = tokens * 3 * inner + queries * (some ? 2 : 1) * inner;
  const int64_t budget = intermediate_bytes();
  const int64_t fit = budget / (sample_elements * element_bytes(dtype));
  const int64_t most = fit < 1 ? 1 : fit;
  const int64_t groups = (args.samples + most - 1) / most;
  const int64_t group = (args.samples + groups - 1) / groups;
  auto* qkv =
      static_cast<char*>(scratch(Slot::kHidden, group * sample_elements * element_bytes(dtype)));
  char* heads = qkv + group * tokens * 3 * inner * element_bytes(dtype);
  char* some_q = heads + group * queries * inner * element_bytes(dtype);

  for (int64_t first = 0; first < args.samples; first += group) {
    const int64_t samples = group < args.samples - first ? group : args.samples - first;
    const int64_t rows = samples * tokens;
    const View x = rows_of(args.x, first * tokens, rows);
    const View out = rows_of(args.out, first * queries, samples * queries);

    // One packed projection, or q, k and v, each into its third of a row.
    for (int64_t i = 0; i < args.projections; ++i) {
      const int64_t height = args.weights[i]->size[0], begin = some && i == 0 ? inner : 0;
      if (begin == height) continue;
      const View third = shifted({qkv, dtype, 0, {}, {}}, i * inner + begin);
      Linear(args, i, begin, height - begin)
          .run(args, matrix(third.data, dtype, rows, height - begin, 3 * inner), x);
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
    const auto per_query = [&](void* data) -> View {
      return {data,
              dtype,
              4,
              {samples, queries, args.num_heads, head_dim},
              {queries * inner, inner, head_dim, 1}};
    };
    const View attended = per_query(heads);
    if (some) {
      const int64_t bytes = out.size[1] * element_bytes(out.dtype);
      for (int64_t i = 0; i < samples * queries; ++i) {
        const int64_t token = i / queries * tokens + i % queries;
        std::memcpy(static_cast<char*>(out.data) + i * bytes, shifted(x, token * x.stride[0]).data,
                    static_cast<size_t>(bytes));
      }
      slices[0] = per_query(some_q);
      Linear(args, 0, 0, inner)
          .run(args, matrix(some_q, dtype, samples * queries, inner, inner), out);
    }
    if (args.rope_cos) {  // q and k lie side by side, like one tensor of twice the heads
      View q_and_k = slices[0];
      q_and_k.size[2] *= 2;
      run.rotate(
          {q_and_k, *args.rope_cos, *args.rope_sin, args.rope_interleaved, args.num_threads});
    }
    View mask;
    if (args.attn_bias) mask = shifted(*args.attn_bias, first * args.attn_bias->stride[0]);
    run.attention({attended, slices[0], slices[1], slices[2], args.attn_bias ? &mask : nullptr,
                   args.scale, args.compute, args.num_threads});

    View row_scale;
    if (args.row_scale) row_scale = shifted(*args.row_scale, first);
    run.linear_residual({out, matrix(heads, dtype, samples * queries, inner, inner),
                         args.proj_weight, some ? out : x, args.proj_scale, args.proj_bias,
                         args.layer_scale, args.row_scale ? &row_scale : nullptr, queries,
                         args.compute, args.num_threads});
  }
}

}  // namespace fastvit::cpu
