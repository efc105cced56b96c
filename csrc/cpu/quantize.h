// int8: rows of f32 rotated and quantised, on their way into a product of integers.
//
// A row takes one scale, so a single massive channel would leave the others a bit or two. Rotating
// first, rows and weights alike, changes no product: a block of neighbouring elements times
// random-looking signs times a Hadamard matrix spreads every element over its whole block, after
// which a row is close to Gaussian whatever it was (QuaRot, Ashkboos et al. 2024). The signs keep a
// constant, such as the positive mean of a GELU, from becoming a spike of its own.

#pragma once

#include "norm.h"
#include "product.h"
#include "runtime.h"

namespace fastvit::cpu::FASTVIT_ISA {

// Elements of a row in whole blocks. The largest block that pads by less than a thirty-second.
struct Rotation {
  int64_t block, padded;

  explicit Rotation(int64_t k) {
    for (block = 256; block > 16; block /= 2) {
      if (round_up(k, block) - k <= k / 32) break;
    }
    padded = round_up(k, block);
  }
};

// Sums and differences of vectors 1, 2, ... kCount / 2 apart.
template <int kCount>
FASTVIT_INLINE void add_and_subtract(f32v (&v)[kCount]) {
#pragma GCC unroll 8
  for (int step = 1; step < kCount; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if ((i & step) == 0) {
        const f32v a = v[i], b = v[i + step];
        v[i] = a + b, v[i + step] = a - b;
      }
    }
  }
}

// x = hadamard(x * signs), unnormalised; returns the largest magnitude per lane. First among as
// many neighbouring vectors as half the registers hold, then among vectors that many apart.
template <int kBlock>
FASTVIT_INLINE f32v rotate_block(float* x, const float* signs) {
  constexpr int kCount = kBlock / kLanes, kHeld = kVectors == 4 ? 16 : 8;
  constexpr int kNear = kCount < kHeld ? kCount : kHeld, kFar = kCount / kNear;
  f32v most = zero();
  for (int first = 0; first < kCount; first += kNear) {
    f32v v[kNear];
#pragma GCC unroll 16
    for (int i = 0; i < kNear; ++i) {
      const int at = (first + i) * kLanes;
      v[i] = hadamard_lanes(load(x + at) * load(signs + at));
    }
    add_and_subtract(v);
#pragma GCC unroll 16
    for (int i = 0; i < kNear; ++i) {
      if constexpr (kFar == 1) most = at_least(abs(v[i]), most);
      store(x + (first + i) * kLanes, v[i]);
    }
  }
  if constexpr (kFar > 1) {
    for (int first = 0; first < kNear; ++first) {
      f32v v[kFar];
#pragma GCC unroll 16
      for (int i = 0; i < kFar; ++i) v[i] = load(x + (first + i * kNear) * kLanes);
      add_and_subtract(v);
#pragma GCC unroll 16
      for (int i = 0; i < kFar; ++i) {
        most = at_least(abs(v[i]), most);
        store(x + (first + i * kNear) * kLanes, v[i]);
      }
    }
  }
  return most;
}

// The largest magnitude of the rotated row; not finite if the row isn't.
template <int kBlock>
static float rotate_row(float* x, int64_t padded, const float* signs) {
  f32v most = zero(), poison = zero();
  for (int64_t i = 0; i < padded; i += kBlock) {
    const f32v here = rotate_block<kBlock>(x + i, signs + i);
    most = at_least(here, most);
    poison = fmadd(here, zero(), poison);  // a maximum forgets a NaN
  }
  return reduce_max(most) + reduce_add(poison);
}

FASTVIT_INLINE float rotate_row(float* x, const Rotation& rotation, const float* signs) {
  switch (rotation.block) {
    case 256:
      return rotate_row<256>(x, rotation.padded, signs);
    case 128:
      return rotate_row<128>(x, rotation.padded, signs);
    case 64:
      return rotate_row<64>(x, rotation.padded, signs);
    case 32:
      return rotate_row<32>(x, rotation.padded, signs);
    default:
      return rotate_row<16>(x, rotation.padded, signs);
  }
}

// Rotates and quantises k elements at x, which has room for whole blocks. Calls put(i, integers)
// for each vector; returns the scale of the integers.
template <class Put>
static float quantize_row(float* x, int64_t k, const Put& put) {
  constexpr float kMost = 127.0f;
  const Rotation rotation(k);
  for (int64_t i = k; i < rotation.padded; ++i) x[i] = 0.0f;
  const float most = rotate_row(x, rotation, rotation_signs(rotation.padded));
  const f32v inverse = set1(most > 0.0f ? kMost / most : 0.0f);
  for (int64_t i = 0; i < rotation.padded; i += kLanes) {
    put(i, to_int(nearest(load(x + i) * inverse)));
  }
  return most / kMost / __builtin_sqrtf(static_cast<float>(rotation.block));
}

// A source of quantised rows, made of a source of rows of k floats.
template <class P, class Source>
struct QuantizedRows {
  const Source& source;
  int64_t k;

  // Returns the scale of the row.
  float operator()(int64_t row, typename P::Element* out) const {
    const int64_t room = Rotation(k).padded * static_cast<int64_t>(sizeof(float));
    auto* x = static_cast<float*>(scratch(Slot::kRow, room));
    source(row, x);
    return quantize_row(x, k, [&](int64_t i, i32v v) { P::store_row(out + i, v); });
  }
};

// `product` in the arithmetic of the weight: P's, or integers. The source makes rows of k elements.
template <class P, class Source, class Epilogue>
static void linear(int64_t m, int64_t k, const Weight& w, int requested_threads,
                   const Source& source, const Epilogue& epilogue) {
  if (w.dtype == DType::kI8) {
    const QuantizedRows<ProductI8, Source> quantized{source, k};
    product<ProductI8>(m, w, requested_threads, quantized, epilogue);
  } else {
    product<P>(m, w, requested_threads, source, epilogue);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
