// Epilogues: what becomes of a tile of a product while it is still in L1.

#pragma once

#include <type_traits>

#include "products.h"
#include "rows.h"
#include "vmath.h"

namespace fastvit::cpu::FASTVIT_ISA {

// Calls whole(the number of vectors) where a tile is as wide as a panel.
template <class Whole>
FASTVIT_INLINE bool if_whole(int64_t cols, const Whole& whole) {
  if (cols == kPanel) return whole(std::integral_constant<int, kVectors>{}), true;
#if defined(FASTVIT_TILES)
  if (cols == ProductBF16::kWidth * kLanes) {
    return whole(std::integral_constant<int, ProductBF16::kWidth>{}), true;
  }
#endif
  return false;
}

// out = activation(tile + bias)
template <class Function>
struct Activate {
  Rows out;
  const float* bias;

  void prefetch(int64_t row, int64_t col, Tiles& tiles) const {
    tiles[0] = out.tile(row * out.ld + col, kPanel);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const bool done = if_whole(cols, [&](auto vectors) {
      const int64_t first = row * out.ld + col;
      if (out.dtype == DType::kF32) {
        whole<vectors>(tile, rows, col, static_cast<float*>(out.data) + first);
      } else {
        whole<vectors>(tile, rows, col, static_cast<bf16*>(out.data) + first);
      }
    });
    if (done) return;
    for (int64_t j = 0; j < cols; j += kLanes) {
      const f32v b = load(bias + col + j);
      for (int64_t i = 0; i < rows; ++i) {
        const f32v y = Function::apply(load(tile + i * kPanel + j) + b);
        out.store_at((row + i) * out.ld + col + j, y, cols - j);
      }
    }
  }

  // A tile as wide as a panel: no tails, a dtype known beforehand, and each line written at once.
  template <int kCount, class T>
  void whole(const float* tile, int64_t rows, int64_t col, T* to) const {
    f32v b[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) b[j] = load(bias + col + j * kLanes);
    for (int64_t i = 0; i < rows; ++i, tile += kPanel, to += out.ld) {
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        store(to + j * kLanes, Function::apply(load(tile + j * kLanes) + b[j]));
      }
    }
  }
};

// out = silu(gate) * value: the tile holds gates, then (from the next whole vector on) their
// values.
struct SwiGlu {
  Rows out;
  const float* bias;
  const float* value_bias;

  void prefetch(int64_t row, int64_t col, Tiles& tiles) const {
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

// Calls run(epilogue) with the epilogue of an activation.
template <class Run>
static void with_activation(Activation activation, const Rows& out, const float* bias,
                            const float* value_bias, const Run& run) {
  switch (activation) {
    case Activation::kNone:
      return run(Activate<Identity>{out, bias});
    case Activation::kGelu:
      if (out.dtype == DType::kBF16) return run(Activate<GeluBF16>{out, bias});
      return run(Activate<Gelu>{out, bias});
    case Activation::kGeluTanh:
      return run(Activate<GeluTanh>{out, bias});
    case Activation::kQuickGelu:
      return run(Activate<QuickGelu>{out, bias});
    case Activation::kSilu:
      return run(Activate<Silu>{out, bias});
    case Activation::kRelu:
      return run(Activate<Relu>{out, bias});
    case Activation::kSwiglu:
      return run(SwiGlu{out, bias, value_bias});
  }
}

// out = residual + row_scale * layer_scale * (tile + bias). A residual element is read before the
// output element of the same place is written, so out may be residual.
struct AddResidual {
  Rows out, residual;
  const float* bias;
  const float* layer_scale;
  const float* row_scale;  // per sample, or null
  int64_t rows_per_sample;
  int64_t first_row = 0;  // of the tensor, where `out` begins

  void prefetch(int64_t row, int64_t col, Tiles& tiles) const {
    tiles[0] = residual.tile(row * residual.ld + col, kPanel);
    tiles[1] = out.tile(row * out.ld + col, kPanel);
  }

  void operator()(const float* tile, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    float scale[kMostRows];
    for (int64_t i = 0; i < rows; ++i) {
      scale[i] = row_scale ? row_scale[(first_row + row + i) / rows_per_sample] : 1.0f;
    }
    const bool done = out.dtype == residual.dtype && if_whole(cols, [&](auto vectors) {
                        if (out.dtype == DType::kF32) {
                          whole<vectors, float>(tile, row, rows, col, scale);
                        } else {
                          whole<vectors, bf16>(tile, row, rows, col, scale);
                        }
                      });
    if (done) return;
    for (int64_t j = 0; j < cols; j += kLanes) {
      const f32v b = load(bias + col + j), gamma = load(layer_scale + col + j);
      for (int64_t i = 0; i < rows; ++i) {
        const f32v y = (load(tile + i * kPanel + j) + b) * gamma;
        const f32v r = residual.load_at((row + i) * residual.ld + col + j, cols - j);
        out.store_at((row + i) * out.ld + col + j, fmadd(y, set1(scale[i]), r), cols - j);
      }
    }
  }

  // As `Activate::whole`.
  template <int kCount, class T>
  void whole(const float* tile, int64_t row, int64_t rows, int64_t col, const float* scale) const {
    f32v b[kCount], gamma[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      b[j] = load(bias + col + j * kLanes);
      gamma[j] = load(layer_scale + col + j * kLanes);
    }
    const T* r = static_cast<const T*>(residual.data) + row * residual.ld + col;
    T* to = static_cast<T*>(out.data) + row * out.ld + col;
    for (int64_t i = 0; i < rows; ++i, tile += kPanel, r += residual.ld, to += out.ld) {
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const f32v y = (load(tile + j * kLanes) + b[j]) * gamma[j];
        store(to + j * kLanes, fmadd(y, set1(scale[i]), load(r + j * kLanes)));
      }
    }
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
