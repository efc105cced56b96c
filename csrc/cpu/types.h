// The vocabulary shared by the bindings, the dispatcher and every operator: plain data only.
//
// Operators are compiled once per instruction set, so nothing here may carry code: an inline
// function with external linkage could be emitted by the AVX-512 build and chosen by the linker for
// a machine that has no AVX-512.

#pragma once

#include <cstdint>

namespace fastvit {

struct bf16 {
  uint16_t bits;
};

// 3 is float16, which only csrc/cuda takes.
enum class DType : int { kF32 = 0, kBF16 = 1, kU8 = 2, kI8 = 4 };

constexpr int kMaxDims = 6;

// A strided array owned by the caller. Strides count elements. Optional arguments are View
// pointers that may be null; a View with a zero size may hold a null data pointer.
struct View {
  void* data;
  DType dtype;
  int ndim;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

enum class Norm : int { kNone = 0, kLayer = 1, kRms = 2 };

enum class Activation : int {
  kNone = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kQuickGelu = 3,
  kSilu = 4,
  kRelu = 5,
  kSwiglu = 6
};

enum class PoolMode : int { kToken = 0, kAvg = 1, kNormAvg = 2 };

// What the products multiply. Floats accumulate in f32. A weight in int8 makes its own product one
// of integers, whatever Compute says of the rest: see quantize.h.
enum class Compute : int { kF32 = 0, kBF16 = 1, kI8 = 2 };

namespace cpu {

struct PatchEmbedArgs {
  View out;     // (B, R + N, D)
  View image;   // (B, C, H, W), any strides, f32 | bf16 | u8
  View weight;  // (D, C, P1, P2) contiguous; int8 for u8 images, whose bytes it sees less 128
  const View* weight_scale;   // (D) f32, of an int8 weight
  const View* weight_shift;   // the same, added to the bias
  const View* weight_packed;  // its panels, as `pack_weight` makes them at this level
  const View* bias;
  const View* pos_embed;      // (N, D)
  const View* prefix;         // (R, D)
  const View* channel_scale;  // (C) f32
  const View* channel_shift;  // (C) f32
  Compute compute;
  int num_threads;
};

// In what follows a weight may be int8, rotated (quantize.h), with one f32 scale per row. Then its
// rows are as long as `x`'s rounded up to whole rotations.

struct NormLinearArgs {
  View out;     // (M, N), or (M, N / 2) for swiglu
  View x;       // (M, K)
  View weight;  // (N, K)
  const View* weight_scale;
  const View* bias;
  const View* norm_weight;
  const View* norm_bias;
  Norm norm;
  float eps;
  Activation activation;
  Compute compute;
  int num_threads;
};

struct AttentionArgs {
  View out;          // (B, Nq, H, D)
  View q, k, v;      // (B, Nq | Nk, H, D), last stride 1
  const View* bias;  // (B, H, Nq, Nk), strides may be 0
  float scale;
  Compute compute;
  int num_threads;
};

struct RotateArgs {
  View x;         // (B, N, H, D), last stride 1; D even
  View cos, sin;  // (P, D) f32 | bf16, last stride 1: of the last P tokens
  bool interleaved;
  int num_threads;
};

struct LinearResidualArgs {
  View out;       // (M, N)
  View x;         // (M, K)
  View weight;    // (N, K)
  View residual;  // (M, N), may be out itself
  const View* weight_scale;
  const View* bias;
  const View* layer_scale;
  const View* row_scale;  // (B) f32: one factor per rows_per_sample rows
  int64_t rows_per_sample;
  Compute compute;
  int num_threads;
};

struct SelfAttentionArgs {
  View out;                // (B N, D); with `queries`, (B queries, D) and contiguous
  View x;                  // (B N, D), the residual too
  const View* weights[3];  // one packed [q; k; v], (3 H d, D), or three, (H d, D)
  const View* scales[3];   // of int8 weights
  const View* biases[3];
  int64_t projections;  // 1 or 3
  View proj_weight;     // (D, H d)
  const View* proj_scale;
  const View* proj_bias;
  const View* norm_weight;
  const View* norm_bias;
  Norm norm;
  float eps;
  const View* attn_bias;  // (B, H, N, N), strides may be 0
  float scale;
  const View* rope_cos;  // (P, d), of q and k; not with `queries`
  const View* rope_sin;
  bool rope_interleaved;
  const View* layer_scale;
  const View* row_scale;  // (B) f32
  int64_t samples, num_heads;
  Compute compute;
  int num_threads;
  int64_t queries = 0;  // compute only so many first tokens of a sample; 0: all
};

struct MlpArgs {
  View out;            // (M, D)
  View x;              // (M, D), the residual too
  View weight1;        // (H, D), or (2 H, D) for swiglu
  View weight2;        // (D, H)
  const View* scale1;  // of int8 weights
  const View* scale2;
  const View* bias1;
  const View* bias2;
  const View* norm_weight;
  const View* norm_bias;
  Norm norm;
  float eps;
  Activation activation;
  const View* layer_scale;
  const View* row_scale;  // (B) f32: one factor per rows_per_sample rows
  int64_t rows_per_sample;
  int64_t hidden;  // H: weight2 in int8 has longer rows
  Compute compute;
  int num_threads;
};

struct PoolArgs {
  View out;  // (B, C), or (B, D) without a head
  View x;    // (B, N, D)
  PoolMode mode;
  int64_t num_prefix_tokens;
  Norm norm;
  const View* norm_weight;
  const View* norm_bias;
  float eps;
  const View* weight;  // (C, D)
  const View* bias;
  Compute compute;
  int num_threads;
};

// out = quantised rotated rows of x: weights, once, by the code that quantises activations.
struct QuantizeArgs {
  View out;    // (M, K rounded up to whole rotations) int8
  View scale;  // (M) f32
  View x;      // (M, K) f32 | bf16
  int num_threads;
};

// out = the panels of an int8 weight, as a product packs them.
struct PackArgs {
  View out;     // packed_bytes(N, K) of them, aligned to 64
  View weight;  // (N, K) int8
};

// One instruction set's build of every operator.
struct Kernels {
  void (*patch_embed)(const PatchEmbedArgs&);
  void (*norm_linear)(const NormLinearArgs&);
  void (*attention)(const AttentionArgs&);
  void (*rotate)(const RotateArgs&);
  void (*linear_residual)(const LinearResidualArgs&);
  void (*mlp)(const MlpArgs&);
  void (*pool)(const PoolArgs&);
  void (*quantize_rows)(const QuantizeArgs&);
  void (*pack_weight)(const PackArgs&);
  int64_t (*packed_bytes)(int64_t n, int64_t k);
  double (*peak)(Compute compute, int num_threads, double seconds);  // G(FL)OP/s
};

}  // namespace cpu
}  // namespace fastvit
