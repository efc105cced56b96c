// B of a product: a linear layer's weight, and its columns packed into panels.

#pragma once

#include "micro_kernel.h"
#include "pack.h"

namespace fastvit::cpu::FASTVIT_ISA {

FASTVIT_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1;
}

struct Weight {
  const void* data;  // (n, k), or (2 n, k) when gated
  DType dtype;
  int64_t ld;
  int64_t n, k;
  bool gated;  // rows n.. are the values of a gated unit: panels hold gates, then their values
  const float* scale = nullptr;  // of an int8 weight's rows, padded to whole vectors
  const void* packed = nullptr;  // its panels (pack_weight.cpp)

  template <class P>
  int64_t panel_columns() const {
    return kLanes * P::kWidth / (gated ? 2 : 1);
  }

  // Share `part` of `parts` of the rows behind the panel at column col, from k0 on.
  template <class P>
  Prefetch prefetch(int64_t col, int64_t k0, int64_t part, int64_t parts) const {
    if (col >= n) return {};
    const int64_t cols = min(panel_columns<P>(), n - col), size = bytes_of(dtype);
    const int64_t share = ceil_div(gated ? 2 * cols : cols, parts);
    int64_t first = part * share, end = cols;
    if (gated && first >= cols) first += n - cols, end = n + cols;
    const char* at = static_cast<const char*>(data) + ((col + first) * ld + k0) * size;
    return {{}, at, ld * size, P::kPair * size, max(min(share, end - first), 0)};
  }
};

// Of a panel of k steps' elements: rounded up to what packing writes.
template <class P>
static int64_t panel_elements(int64_t k) {
  return (ceil_div(k, kLanes * P::kPair) * kLanes + P::kHasSums) * P::kWidth * kLanes * P::kPair;
}

// Columns col .. col + cols of the weight, packed.
template <class P>
struct Panel {
  const typename P::Element* data;
  const float* scales;
  int64_t col, cols, vectors;
};

// Columns col .. col + cols of the weight, k0 .. k0 + k. Returns the panel's width in vectors.
template <class P>
static int64_t pack_panel(const Weight& w, int64_t col, int64_t cols, int64_t k0, int64_t k,
                          typename P::Element* panel) {
  const int64_t half = ceil_div(cols, kLanes);
  const int64_t vectors = w.gated ? 2 * half : half;
  const int64_t line = vectors * kLanes * P::kPair;
  typename P::Element* lines = panel + (P::kHasSums ? line : 0);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t first = (v % half) * kLanes, at = v * kLanes * P::kPair;
    const int64_t row = col + first + (v >= half ? w.n : 0);
    const auto sums =
        pack_columns<P>(w.data, w.dtype, row * w.ld + k0, w.ld, cols - first, k, lines + at, line);
    if constexpr (P::kHasSums) {
      store(reinterpret_cast<float*>(panel + at), (f32v)(sums * -P::kShift));
    }
  }
  return vectors;
}

// The scales of a panel's columns, as the micro-kernel reads them.
template <class P>
static const float* panel_scales(const Weight& w, int64_t col, int64_t cols, float* room) {
  if constexpr (!P::kQuantized) return nullptr;
  if (!w.gated) return w.scale + col;
  const int64_t half = round_up(cols, kLanes);
  for (int64_t j = 0; j < half; j += kLanes) {
    store(room + j, load(w.scale + col + j));
    store(room + half + j, load(w.scale + w.n + col + j));
  }
  return room;
}

}  // namespace fastvit::cpu::FASTVIT_ISA
