#include "calls.h"

#include <initializer_list>

#include "dispatch.h"

namespace fastvit::calls {
namespace {

// (B, H, W, C) as (B, C, H, W).
View channels_first(View image) {
  for (int64_t* of : {image.size, image.stride}) {
    const int64_t channels = of[3];
    of[3] = of[2], of[2] = of[1], of[1] = channels;
  }
  return image;
}

// (1, N, D) as (N, D).
const View* as_rows(const View* given, View& rows) {
  if (given == nullptr || given->ndim == 2) return given;
  rows = *given;
  rows.ndim = 2;
  for (int64_t* of : {rows.size, rows.stride}) of[0] = of[1], of[1] = of[2];
  return &rows;
}

}  // namespace

void patch_embed(const View& out, const View& image, const View& weight, const View* weight_scale,
                 const View* weight_shift, const View* weight_packed, const View* bias,
                 const View* pos_embed, const View* prefix, const View* channel_scale,
                 const View* channel_shift, int channels_last, int compute, int num_threads) {
  View positions, prefix_rows;
  cpu::kernels().patch_embed(
      {out, channels_last != 0 ? channels_first(image) : image, weight, weight_scale, weight_shift,
       weight_packed, bias, as_rows(pos_embed, positions), as_rows(prefix, prefix_rows),
       channel_scale, channel_shift, static_cast<Compute>(compute), num_threads});
}

void norm_linear(const View& out, const View& x, const View& weight, const View* weight_scale,
                 const View* bias, const View* norm_weight, const View* norm_bias, int norm,
                 float eps, int activation, int compute, int num_threads) {
  cpu::kernels().norm_linear({out, x, weight, weight_scale, bias, norm_weight, norm_bias,
                              static_cast<Norm>(norm), eps, static_cast<Activation>(activation),
                              static_cast<Compute>(compute), num_threads});
}

void attention(const View& out, const View& q, const View& k, const View& v, const View* bias,
               float scale, int compute, int num_threads) {
  cpu::kernels().attention({out, q, k, v, bias, scale, static_cast<Compute>(compute), num_threads});
}

void rotate(const View& x, const View& cos, const View& sin, int interleaved, int num_threads) {
  cpu::kernels().rotate({x, cos, sin, interleaved != 0, num_threads});
}

void linear_residual(const View& out, const View& x, const View& weight, const View* weight_scale,
                     const View* bias, const View& residual, const View* layer_scale,
                     const View* row_scale, int64_t rows_per_sample, int compute, int num_threads) {
  cpu::kernels().linear_residual({out, x, weight, residual, weight_scale, bias, layer_scale,
                                  row_scale, rows_per_sample, static_cast<Compute>(compute),
                                  num_threads});
}

void self_attention(const View& out, const View& x, const View& q_weight, const View* q_scale,
                    const View* q_bias, const View* k_weight, const View* k_scale,
                    const View* k_bias, const View* v_weight, const View* v_scale,
                    const View* v_bias, const View& proj_weight, const View* proj_scale,
                    const View* proj_bias, const View* norm_weight, const View* norm_bias, int norm,
                    float eps, const View* attn_bias, float scale, const View* rope_cos,
                    const View* rope_sin, int rope_interleaved, const View* layer_scale,
                    const View* row_scale, int64_t samples, int64_t num_heads, int compute,
                    int num_threads) {
  cpu::self_attention({out,
                       x,
                       {&q_weight, k_weight, v_weight},
                       {q_scale, k_scale, v_scale},
                       {q_bias, k_bias, v_bias},
                       k_weight ? 3 : 1,
                       proj_weight,
                       proj_scale,
                       proj_bias,
                       norm_weight,
                       norm_bias,
                       static_cast<Norm>(norm),
                       eps,
                       attn_bias,
                       scale,
                       rope_cos,
                       rope_sin,
                       rope_interleaved != 0,
                       layer_scale,
                       row_scale,
                       samples,
                       num_heads,
                       static_cast<Compute>(compute),
                       num_threads});
}

void mlp(const View& out, const View& x, const View& weight1, const View* scale1, const View* bias1,
         const View& weight2, const View* scale2, const View* bias2, const View* norm_weight,
         const View* norm_bias, int norm, float eps, int activation, const View* layer_scale,
         const View* row_scale, int64_t rows_per_sample, int compute, int num_threads) {
  const auto kind = static_cast<Activation>(activation);
  cpu::kernels().mlp({out, x, weight1, weight2, scale1, scale2, bias1, bias2, norm_weight,
                      norm_bias, static_cast<Norm>(norm), eps, kind, layer_scale, row_scale,
                      rows_per_sample, weight1.size[0] / (kind == Activation::kSwiglu ? 2 : 1),
                      static_cast<Compute>(compute), num_threads});
}

void quantize_rows(const View& out, const View& scale, const View& x, int num_threads) {
  cpu::kernels().quantize_rows({out, scale, x, num_threads});
}

void pack_weight(const View& out, const View& weight) { cpu::kernels().pack_weight({out, weight}); }

void pool(const View& out, const View& x, int mode, int64_t num_prefix_tokens, int norm,
          const View* norm_weight, const View* norm_bias, float eps, const View* weight,
          const View* bias, int compute, int num_threads) {
  cpu::kernels().pool({out, x, static_cast<PoolMode>(mode), num_prefix_tokens,
                       static_cast<Norm>(norm), norm_weight, norm_bias, eps, weight, bias,
                       static_cast<Compute>(compute), num_threads});
}

}  // namespace fastvit::calls
