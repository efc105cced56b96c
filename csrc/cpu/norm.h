// LayerNorm and RMSNorm of one row, and the source functor that feeds them to a product.

#pragma once

#include "rows.h"
#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

// A normalised element is (x - mean) * rstd - offset, times weight, plus bias.
struct RowStatistics {
  float mean, rstd, offset;
};

// Calls f(index, vector, elements in it, chain) over a row; chains 0 to 3 may accumulate side by
// side.
template <class T, class F>
FASTVIT_INLINE void for_each_vector(const T* x, int64_t k, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) f(i + c * kLanes, load(x + i + c * kLanes), kLanes, c);
  }
  for (; i + kLanes <= k; i += kLanes) f(i, load(x + i), kLanes, 0);
  if (i < k) f(i, load(x + i, k - i), k - i, 0);
}

// LayerNorm sums deviations from a first mean m. x - m is exact where it matters (x close to m), so
// neither a mean far above the deviation nor a few massive channels cost accuracy; what rounding
// left in m is the mean of the deviations, and is taken off again through `offset`.
template <class T>
static RowStatistics row_statistics(const T* x, int64_t k, Norm norm, float eps) {
  const float per_element = 1.0f / static_cast<float>(k);
  f32v sum[4] = {zero(), zero(), zero(), zero()}, square[4] = {zero(), zero(), zero(), zero()};
  const auto total = [](const f32v(&v)[4]) { return reduce_add((v[0] + v[1]) + (v[2] + v[3])); };

  float mean = 0.0f;
  if (norm == Norm::kLayer) {
    for_each_vector(x, k, [&](int64_t, f32v v, int64_t, int c) { sum[c] += v; });
    mean = total(sum) * per_element;
    for (f32v& each : sum) each = zero();
  }
  const f32v m = set1(mean);
  for_each_vector(x, k, [&](int64_t, f32v v, int64_t n, int c) {
    const f32v d = n == kLanes ? v - m : keep_first(v - m, n);
    sum[c] += d;
    square[c] = fmadd(d, d, square[c]);
  });
  const float mean_square = total(square) * per_element;
  if (norm == Norm::kRms) return {0.0f, 1.0f / __builtin_sqrtf(mean_square + eps), 0.0f};
  const float left = total(sum) * per_element;
  const float variance = mean_square - left * left;
  const float rstd = 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : 0.0f) + eps);
  return {mean, rstd, left * rstd};
}

// Writes whole vectors: `out` must have room up to the next multiple of kLanes.
template <class T, class Element>
static void norm_row(const T* x, int64_t k, Norm norm, float eps, const float* weight,
                     const float* bias, Element* out) {
  if (norm == Norm::kNone) {
    for_each_vector(x, k, [&](int64_t i, f32v v, int64_t, int) { store(out + i, v); });
    return;
  }
  const RowStatistics s = row_statistics(x, k, norm, eps);
  const f32v mean = set1(s.mean), rstd = set1(s.rstd), offset = set1(-s.offset);
  for_each_vector(x, k, [&](int64_t i, f32v v, int64_t, int) {
    const f32v normal = fmadd(v - mean, rstd, offset);
    store(out + i, fmadd(normal, load(weight + i), load(bias + i)));
  });
}

// A source of (normalised) rows.
struct NormRows {
  Rows x;
  int64_t k;
  Norm norm;
  float eps;
  const float* weight;
  const float* bias;

  template <class Element>
  void operator()(int64_t row, Element* out) const {
    prefetch(row + 2);
    if (x.dtype == DType::kF32) {
      norm_row(static_cast<const float*>(x.data) + row * x.ld, k, norm, eps, weight, bias, out);
    } else {
      norm_row(static_cast<const bf16*>(x.data) + row * x.ld, k, norm, eps, weight, bias, out);
    }
  }

  // Hardware foresees the lines of a page: a row of 768 floats is over before it has begun. Beyond
  // the last row the instruction does nothing.
  FASTVIT_INLINE_METHOD void prefetch(int64_t row) const {
    const TileRows line = x.tile(row * x.ld, k);
    for (int64_t b = 0; b < line.bytes; b += 64) __builtin_prefetch(line.rows + b, 0, 3);
  }
};

// A source of rows as they are.
struct PlainRows : NormRows {
  PlainRows(const Rows& x, int64_t k) : NormRows{x, k, Norm::kNone, 0.0f, nullptr, nullptr} {}
};

}  // namespace fastvit::cpu::FASTVIT_ISA
