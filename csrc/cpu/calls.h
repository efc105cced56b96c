// The operators as functions of plain arguments, in the order in which Python passes them. Integers
// stand for enumerators. Arguments are trusted: fastvit.ops has checked them.

#pragma once

#include "types.h"

namespace fastvit::calls {

void patch_embed(const View& out, const View& image, const View& weight, const View* weight_scale,
                 const View* weight_shift, const View* weight_packed, const View* bias,
                 const View* pos_embed, const View* prefix, const View* channel_scale,
                 const View* channel_shift, int channels_last, int compute, int num_threads);
void norm_linear(const View& out, const View& x, const View& weight, const View* weight_scale,
                 const View* bias, const View* norm_weight, const View* norm_bias, int norm,
                 float eps, int activation, int compute, int num_threads);
void attention(const View& out, const View& q, const View& k, const View& v, const View* bias,
               float scale, int compute, int num_threads);
void rotate(const View& x, const View& cos, const View& sin, int interleaved, int num_threads);
void linear_residual(const View& out, const View& x, const View& weight, const View* weight_scale,
                     const View* bias, const View& residual, const View* layer_scale,
                     const View* row_scale, int64_t rows_per_sample, int compute, int num_threads);
void self_attention(const View& out, const View& x, const View& q_weight, const View* q_scale,
                    const View* q_bias, const View* k_weight, const View* k_scale,
                    const View* k_bias, const View* v_weight, const View* v_scale,
                    const View* v_bias, const View& proj_weight, const View* proj_scale,
                    const View* proj_bias, const View* norm_weight, const View* norm_bias, int norm,
                    float eps, const View* attn_bias, float scale, const View* rope_cos,
                    const View* rope_sin, int rope_interleaved, const View* layer_scale,
                    const View* row_scale, int64_t samples, int64_t num_heads, int compute,
                    int num_threads);
void mlp(const View& out, const View& x, const View& weight1, const View* scale1, const View* bias1,
         const View& weight2, const View* scale2, const View* bias2, const View* norm_weight,
         const View* norm_bias, int norm, float eps, int activation, const View* layer_scale,
         const View* row_scale, int64_t rows_per_sample, int compute, int num_threads);
void quantize_rows(const View& out, const View& scale, const View& x, int num_threads);
void pack_weight(const View& out, const View& weight);
void pool(const View& out, const View& x, int mode, int64_t num_prefix_tokens, int norm,
          const View* norm_weight, const View* norm_bias, float eps, const View* weight,
          const View* bias, int compute, int num_threads);

}  // namespace fastvit::calls
