// The vector abstraction: one f32 vector type and a handful of functions.
//
// Include only from files compiled per instruction set. FASTVIT_ISA names the namespace, and the
// compiler's own feature macros (set by that build's -m flags) choose the code, so the names below
// mean different things in different namespaces and never meet at link time.
//
//   namespace     vector             kLanes  kVectors  panel (columns)  accumulators of 6 rows
//   scalar        GCC vector ext.    4       2         8                12
//   avx2          __m256             8       2         16               12 of 16 registers
//   avx512*       __m512             16      4         64               24 of 32 registers
//   neon*         float32x4_t        4       4         16               24 of 32 registers
//
// amx is avx512 with other products of bf16 and int8 (products.h).
//
// +, -, *, / and comparisons are the compiler's own operators on vector types.

#pragma once

#include <cstdint>

#include "types.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // GCC 12's own headers read "undefined" registers on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define FASTVIT_INLINE static inline __attribute__((always_inline))
#define FASTVIT_INLINE_METHOD inline __attribute__((always_inline))

// Makes the compiler believe that a vector register has changed.
#if defined(__AVX512F__)
#define FASTVIT_TOUCH(v) asm volatile("" : "+v"(v))
#elif defined(__x86_64__)
#define FASTVIT_TOUCH(v) asm volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define FASTVIT_TOUCH(v) asm volatile("" : "+w"(v))
#else
#define FASTVIT_TOUCH(v) asm volatile("" : "+m"(v))
#endif

namespace fastvit::cpu::FASTVIT_ISA {

// std::min and std::max are templates with external linkage: see types.h.
FASTVIT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTVIT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTVIT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTVIT_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scalar conversions, used for tails and single values.
FASTVIT_INLINE float to_f32(float x) { return x; }
FASTVIT_INLINE float to_f32(uint8_t x) { return x; }
FASTVIT_INLINE float to_f32(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
FASTVIT_INLINE bf16 to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace fastvit::cpu::FASTVIT_ISA

#if defined(__aarch64__)
#include "simd_neon.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_plain.h"
#endif

namespace fastvit::cpu::FASTVIT_ISA {

FASTVIT_INLINE float first_lane(f32v v) { return v[0]; }

// Two vectors side by side.
FASTVIT_INLINE void store_two(float* p, f32v a, f32v b) {
  store(p, a);
  store(p + kLanes, b);
}
FASTVIT_INLINE void store_two(bf16* p, f32v a, f32v b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}

constexpr int kPanel = kVectors * kLanes;  // columns of a panel, the most a micro-kernel finishes

}  // namespace fastvit::cpu::FASTVIT_ISA
