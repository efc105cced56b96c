// The vector abstraction on arm64: simd.h includes it.

#pragma once

#include <arm_neon.h>

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int kLanes = 4;
constexpr int kVectors = 4;
using f32v = float32x4_t;
using i32v = int32x4_t;

FASTVIT_INLINE f32v set1(float x) { return vdupq_n_f32(x); }
FASTVIT_INLINE f32v zero() { return set1(0.0f); }

FASTVIT_INLINE f32v widen_bf16(uint16x4_t half) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
}
FASTVIT_INLINE uint16x4_t narrow_bf16(f32v v) {  // round to nearest even; NaN stays NaN
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
#endif
}

FASTVIT_INLINE f32v load(const float* p) { return vld1q_f32(p); }
FASTVIT_INLINE f32v load(const bf16* p) { return widen_bf16(vld1_u16(&p->bits)); }
FASTVIT_INLINE f32v load(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
FASTVIT_INLINE void store(float* p, f32v v) { vst1q_f32(p, v); }
FASTVIT_INLINE void store(bf16* p, f32v v) { vst1_u16(&p->bits, narrow_bf16(v)); }

// Tails, element by element: there is no mask, and at most three are left.
template <class T>
FASTVIT_INLINE f32v load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  f32v v = zero();
  if (n > 0) v = vsetq_lane_f32(to_f32(p[0]), v, 0);
  if (n > 1) v = vsetq_lane_f32(to_f32(p[1]), v, 1);
  if (n > 2) v = vsetq_lane_f32(to_f32(p[2]), v, 2);
  return v;
}
FASTVIT_INLINE void store(float* p, f32v v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  if (n > 0) vst1q_lane_f32(p, v, 0);
  if (n > 1) vst1q_lane_f32(p + 1, v, 1);
  if (n > 2) vst1q_lane_f32(p + 2, v, 2);
}
FASTVIT_INLINE void store(bf16* p, f32v v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  const uint16x4_t half = narrow_bf16(v);
  if (n > 0) vst1_lane_u16(&p[0].bits, half, 0);
  if (n > 1) vst1_lane_u16(&p[1].bits, half, 1);
  if (n > 2) vst1_lane_u16(&p[2].bits, half, 2);
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n, f32v others) {
  const int32_t lanes[kLanes] = {0, 1, 2, 3};
  const uint32x4_t kept = vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(static_cast<int32_t>(n)));
  return vbslq_f32(kept, v, others);
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n) { return keep_first(v, n, zero()); }

FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return vfmaq_f32(c, a, b); }
// These instructions return NaN where either operand is NaN: `v` keeps its NaN.
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return vmaxq_f32(v, low); }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return vminq_f32(v, high); }
FASTVIT_INLINE f32v abs(f32v v) { return vabsq_f32(v); }
FASTVIT_INLINE f32v nearest(f32v v) { return vrndnq_f32(v); }
FASTVIT_INLINE i32v to_int(f32v v) { return vcvtnq_s32_f32(v); }
FASTVIT_INLINE f32v to_float(i32v v) { return vcvtq_f32_s32(v); }
// The lowest byte of each lane.
FASTVIT_INLINE void store_bytes(void* p, i32v v) {
  const int16x4_t words = vmovn_s32(v);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  __builtin_memcpy(p, &four, 4);
}
// The lowest two bytes of each lane.
FASTVIT_INLINE void store_words(void* p, i32v v) {
  vst1_s16(static_cast<int16_t*>(p), vmovn_s32(v));
}

FASTVIT_INLINE float reduce_add(f32v v) { return vaddvq_f32(v); }
FASTVIT_INLINE float reduce_max(f32v v) { return vmaxvq_f32(v); }

// v times the Hadamard matrix of kLanes rows: sums and differences of lanes 1 and 2 apart.
FASTVIT_INLINE f32v swap_pairs(f32v v) { return vrev64q_f32(v); }
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  const float signs[2][kLanes] = {{1, -1, 1, -1}, {1, 1, -1, -1}};
  v = fmadd(v, load(signs[0]), swap_pairs(v));
  return fmadd(v, load(signs[1]), vextq_f32(v, v, 2));
}

// r[i] holds row i; afterwards r[j] holds column j.
FASTVIT_INLINE void transpose(f32v (&r)[kLanes]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
  const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
  const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

}  // namespace fastvit::cpu::FASTVIT_ISA
