// Operands that epilogues and sources touch: rows of f32 or bf16, and padded f32 vectors.

#pragma once

#include "runtime.h"
#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

// The memory behind the rows of one tile, for prefetching.
struct TileRows {
  const char* rows = nullptr;
  int64_t ld = 0, bytes = 0;
};

// What finishing a tile touches: two of the epilogue's, and the tile itself.
using Tiles = TileRows[3];

// Rows of f32 or bf16, addressed in elements. The dtype is a predictable branch per vector.
struct Rows {
  void* data;
  DType dtype;
  int64_t ld;

  Rows(void* first, DType type, int64_t stride) : data(first), dtype(type), ld(stride) {}
  Rows(const View& view, int64_t stride) : Rows(view.data, view.dtype, stride) {}

  // The rows from `row` on.
  Rows from(int64_t row) const {
    const int64_t bytes = row * ld * (dtype == DType::kF32 ? 4 : 2);
    return {static_cast<char*>(data) + bytes, dtype, ld};
  }

  FASTVIT_INLINE_METHOD f32v load_at(int64_t offset, int64_t n) const {
    if (dtype == DType::kF32) {
      const float* p = static_cast<const float*>(data) + offset;
      return n >= kLanes ? load(p) : load(p, n);
    }
    const bf16* p = static_cast<const bf16*>(data) + offset;
    return n >= kLanes ? load(p) : load(p, n);
  }

  TileRows tile(int64_t offset, int64_t columns) const {
    const int64_t size = dtype == DType::kF32 ? 4 : 2;
    return {static_cast<const char*>(data) + offset * size, ld * size, columns * size};
  }

  FASTVIT_INLINE_METHOD void store_at(int64_t offset, f32v v, int64_t n) const {
    if (dtype == DType::kF32) {
      float* p = static_cast<float*>(data) + offset;
      n >= kLanes ? store(p, v) : store(p, v, n);
    } else {
      bf16* p = static_cast<bf16*>(data) + offset;
      n >= kLanes ? store(p, v) : store(p, v, n);
    }
  }
};

// Per-column parameters as f32, padded to whole vectors, so that inner loops need neither a mask
// nor a dtype. They are a few KiB and live in the calling thread's scratch.
class Vectors {
 public:
  Vectors(int64_t count, int64_t longest)
      : next_(static_cast<float*>(
            scratch(Slot::kVectors, count * round_up(longest, kLanes) * sizeof(float)))) {}

  // Elements first .. first + n of the view; `absent` everywhere when there is no view.
  float* take(const View* view, int64_t first, int64_t n, float absent) {
    float* out = room(n);
    for (int64_t i = 0; i < n; i += kLanes) {
      store(out + i, view ? Rows(*view, 0).load_at(first + i, n - i) : set1(absent));
    }
    return out;
  }

  // One scale for each row of an int8 weight; null for another one.
  const float* take_scale(const View* scale, int64_t n) {
    return scale ? take(scale, 0, n, 0.0f) : nullptr;
  }

  // Uninitialised space for n more values.
  float* room(int64_t n) {
    float* out = next_;
    next_ += round_up(n, kLanes);
    return out;
  }

 private:
  float* next_;
};

}  // namespace fastvit::cpu::FASTVIT_ISA
