// Product traits on arm64: products.h includes it.
//
// The micro-kernel is 6 rows x 4 vectors. Of 32 registers 24 accumulate, 4 hold a line of B, and
// the rest take elements of A: multiply-adds read one element of a register ("by element"), so an
// element of A is one scalar load, not a load and a duplication that would compete for the vector
// pipes. A step is 24 multiply-adds, 6 loads of A and 2 of B (pairs); 8 x 3 vectors have as many
// accumulators for 8 + 2 loads, and a panel of 12 columns, which gated units can't halve; 4 x 6
// vectors read half as much again of B, which comes from L2.

#pragma once

#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

// For products, which take A by element: only lane 0 counts. The instruction is spelled out because
// compilers insert the element into a vector of zeros, at three instructions, or duplicate it.
typedef float any_32_bits __attribute__((may_alias));
FASTVIT_INLINE f32v load_first(const void* p) {
  f32v v;
  __asm__("ldr %s0, %1" : "=w"(v) : "m"(*static_cast<const any_32_bits*>(p)));
  return v;
}
FASTVIT_INLINE f32v fmadd_first(f32v a, f32v b, f32v c) { return vfmaq_laneq_f32(c, b, a, 0); }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// BFDOT multiplies pairs as AVX512-BF16 does. BFMMLA does twice the work per instruction, but on
// 2 x 4 by 4 x 2 blocks: another packing of A and B, and tiles that a row can't be stored from.
struct ProductBfdot {
  using Element = bf16;
  using Unit = bfloat16x8_t;
  static constexpr int kPair = 2;

  FASTVIT_INLINE Unit load_unit(const bf16* p) {
    return vreinterpretq_bf16_u16(vld1q_u16(&p->bits));
  }
  FASTVIT_INLINE Unit broadcast(const bf16* p) { return vreinterpretq_bf16_f32(load_first(p)); }
  FASTVIT_INLINE f32v mac(Unit a, Unit b, f32v c) { return vbfdotq_laneq_f32(c, b, a, 0); }
  FASTVIT_INLINE f32v mac_lanes(Unit a, Unit b, f32v c) { return vbfdotq_f32(c, a, b); }

  // kLanes steps of one row of B, as 32-bit lanes; `n` elements of it exist.
  FASTVIT_INLINE f32v load_steps(const bf16* p, int64_t n) {
    if (n >= 2 * kLanes) return vreinterpretq_f32_u16(vld1q_u16(&p->bits));
    uint16_t some[2 * kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i].bits;
    return vreinterpretq_f32_u16(vld1q_u16(some));
  }
  FASTVIT_INLINE f32v load_steps(const float* p, int64_t n) {
    const f32v low = load(p, n);  // nothing is read beyond n
    const f32v high = n > kLanes ? load(p + kLanes, n - kLanes) : zero();
    return vreinterpretq_f32_u16(vcombine_u16(narrow_bf16(low), narrow_bf16(high)));
  }

  // One step of kLanes columns from two rows: lane i is (a[i], b[i]), `n` of which exist.
  template <class T>
  FASTVIT_INLINE f32v load_pairs(const T* a, const T* b, int64_t n) {
    const uint16x4_t even = halves(a, n), odd = b == nullptr ? vdup_n_u16(0) : halves(b, n);
    return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd)));
  }

 private:
  FASTVIT_INLINE uint16x4_t halves(const float* p, int64_t n) { return narrow_bf16(load(p, n)); }
  FASTVIT_INLINE uint16x4_t halves(const bf16* p, int64_t n) {
    return n >= kLanes ? vld1_u16(&p->bits) : narrow_bf16(load(p, n));
  }
};
#endif

#if defined(__ARM_FEATURE_DOTPROD)
// SDOT multiplies signed by signed bytes: nothing to shift, no sums.
struct ProductOfIntegers {
  using Element = int8_t;
  using Unit = int8x16_t;
  static constexpr int kPair = 4;
  static constexpr bool kHasSums = false;

  FASTVIT_INLINE Unit load_unit(const Element* p) { return vld1q_s8(p); }
  FASTVIT_INLINE Unit broadcast(const Element* p) { return vreinterpretq_s8_f32(load_first(p)); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) { return vdotq_laneq_s32(c, b, a, 0); }
  FASTVIT_INLINE i32v mac_lanes(Unit a, Unit b, i32v c) { return vdotq_s32(c, a, b); }

  FASTVIT_INLINE void store_row(Element* p, i32v v) { store_bytes(p, v); }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 4 * kLanes) return vreinterpretq_f32_s8(vld1q_s8(p));
    int8_t some[4 * kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return vreinterpretq_f32_s8(vld1q_s8(some));
  }
};
#else
// SMLAL multiplies 16-bit integers to 32-bit sums. It takes one k of four columns, so a line of
// pairs is sorted into its first and its second k when it is loaded. Multiplying 32-bit lanes takes
// as many instructions, each of them at half the rate (Cortex-A72, Neoverse N1), and shifts.
struct ProductOfIntegers {
  using Element = int16_t;
  using Unit = int16x8_t;
  static constexpr int kPair = 2;
  static constexpr bool kHasSums = false;

  FASTVIT_INLINE Unit load_unit(const Element* p) {
    const uint8_t order[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    return vreinterpretq_s16_u8(vqtbl1q_u8(vreinterpretq_u8_s16(vld1q_s16(p)), vld1q_u8(order)));
  }
  FASTVIT_INLINE Unit broadcast(const Element* p) { return vreinterpretq_s16_f32(load_first(p)); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) {
    return vmlal_high_laneq_s16(vmlal_laneq_s16(c, vget_low_s16(b), a, 0), b, a, 1);
  }
  FASTVIT_INLINE i32v mac_lanes(Unit a, Unit b, i32v c) {
    return vmlal_high_s16(vmlal_s16(c, vget_low_s16(a), vget_low_s16(b)), a, b);
  }

  FASTVIT_INLINE void store_row(Element* p, i32v v) { store_words(p, v); }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 2 * kLanes) return vreinterpretq_f32_s16(vmovl_s8(vld1_s8(p)));
    int8_t some[2 * kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return vreinterpretq_f32_s16(vmovl_s8(vld1_s8(some)));
  }
};
#endif

}  // namespace fastvit::cpu::FASTVIT_ISA
