// Elementary functions and activations on vectors.
//
// Coefficients are minimax fits (Lawson iteration in a Chebyshev basis, float64, then rounded).

#pragma once

#if defined(__AVX512F__)
#include "gelu_table.h"
#endif
#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

#if defined(__AVX512F__)
// The whole number nearest to x, as a power of two; underflows to zero.
struct Power {
  f32v whole;

  FASTVIT_INLINE_METHOD explicit Power(f32v x) : whole(nearest(x)) {}
  FASTVIT_INLINE_METHOD f32v times(f32v p) const { return scale_by_power(p, whole); }
};
constexpr float kLowestPower = -160.0f;
#else
// The whole number nearest to x, in [kLowestPower, 127], as a power of two: 2^-127 is zero.
struct Power {
  static constexpr float kMagic = 12582912.0f + 127;  // 1.5 * 2^23 leaves no bits for a fraction
  f32v biased, whole;

  FASTVIT_INLINE_METHOD explicit Power(f32v x)
      : biased(x + set1(kMagic)), whole(biased - set1(kMagic)) {}
  // The sum's lowest bits are the exponent of an f32.
  FASTVIT_INLINE_METHOD f32v times(f32v p) const { return p * (f32v)((i32v)biased << 23); }
};
constexpr float kLowestPower = -127.0f;
#endif

// 2^x, relative error 1.5e-7. Underflows to zero, so exp2(-inf) == 0; x <= 127 is required.
FASTVIT_INLINE f32v exp2(f32v x) {
  x = at_least(x, set1(kLowestPower));
  const Power power(x);
  const f32v f = x - power.whole;  // [-0.5, 0.5]
  f32v p = set1(1.3276472e-3f);
  p = fmadd(p, f, set1(9.6755419e-3f));
  p = fmadd(p, f, set1(5.5507131e-2f));
  p = fmadd(p, f, set1(2.4022120e-1f));
  p = fmadd(p, f, set1(6.9314694e-1f));
  p = fmadd(p, f, set1(1.0000001f));
  return power.times(p);
}

// 2^x, relative error 7.5e-5: enough for a result that is rounded to bf16.
#if defined(__AMX_TILE__) || defined(FASTVIT_AMX_STAND_IN)
// Intel's cores take a subtraction and a maximum less this way: the fraction of -infinity is zero,
// and the power is taken of x rounded down.
FASTVIT_INLINE f32v exp2_bf16(f32v x) {
  const f32v f = fraction(x);  // [0, 1)
  f32v p = set1(7.8024516e-2f);
  p = fmadd(p, f, set1(2.2606716e-1f));
  p = fmadd(p, f, set1(6.9583354e-1f));
  p = fmadd(p, f, set1(9.9992522e-1f));
  return scale_by_power(p, x);
}
#else
FASTVIT_INLINE f32v exp2_bf16(f32v x) {
  x = at_least(x, set1(kLowestPower));
  const Power power(x);
  const f32v f = x - power.whole;  // [-0.5, 0.5]
  f32v p = set1(5.5171667e-2f);
  p = fmadd(p, f, set1(2.4261112e-1f));
  p = fmadd(p, f, set1(6.9326099e-1f));
  p = fmadd(p, f, set1(9.9992807e-1f));
  return power.times(p);
}
#endif

constexpr float kLog2e = 1.44269504088896340736f;

// x / (1 + exp(-slope x)): silu for slope 1.
FASTVIT_INLINE f32v gated_sigmoid(f32v x, f32v slope_log2e) {
  const f32v power = at_most(zero() - x * slope_log2e, set1(126.0f));
  return x / (set1(1.0f) + exp2(power));
}

struct Identity {
  FASTVIT_INLINE f32v apply(f32v x) { return x; }
};

// x * Phi(x) = max(x, 0) - |x| * Phi(-|x|).
#if defined(__AVX512F__)
// By table: 0.6 of the time of a polynomial that reaches everywhere, whose chain of dependent
// instructions is twice as long.
template <int kDegree>
struct GeluOf {
  FASTVIT_INLINE f32v apply(f32v x, const float (&table)[kDegree + 1][kGeluPieces]) {
    const f32v t = at_most(abs(x), set1((kGeluPieces - 1) * kGeluPiece));
    const f32v magic = set1(12582912.0f);  // 1.5 * 2^23: the sum's lowest bits are a whole number
    const f32v piece = fmadd(t, set1(1 / kGeluPiece), magic);
    const f32v f = fmadd(piece - magic, set1(-kGeluPiece), t);
    f32v p = look_up(table[kDegree], (i32v)piece);
#pragma GCC unroll 4
    for (int d = kDegree - 1; d >= 0; --d) p = fmadd(p, f, look_up(table[d], (i32v)piece));
    return at_least(x, zero()) - t * p;
  }
};
struct Gelu {
  FASTVIT_INLINE f32v apply(f32v x) { return GeluOf<4>::apply(x, kGeluF32); }
};
// Enough for a result that is rounded to bf16.
struct GeluBF16 {
  FASTVIT_INLINE f32v apply(f32v x) { return GeluOf<2>::apply(x, kGeluBF16); }
};
#else
// Phi(-t) = 2^P(t). The degree 8 fit of P weighs the error by Phi(-t), leaving 8e-9 of |x|, and
// falls without bound beyond the fitted range.
struct Gelu {
  FASTVIT_INLINE f32v apply(f32v x) {
    const f32v t = at_most(abs(x), set1(40.0f));
    f32v p = set1(-2.7720528e-6f);
    p = fmadd(p, t, set1(3.8620790e-5f));
    p = fmadd(p, t, set1(-1.8254781e-4f));
    p = fmadd(p, t, set1(-1.4586964e-4f));
    p = fmadd(p, t, set1(7.0754710e-3f));
    p = fmadd(p, t, set1(-5.2505028e-2f));
    p = fmadd(p, t, set1(-4.5920490e-1f));
    p = fmadd(p, t, set1(-1.1511058f));
    p = fmadd(p, t, set1(-1.0f));
    return at_least(x, zero()) - t * exp2(p);
  }
};

// The same with a degree 5 fit, 2e-5 of |x| off: enough for a result that is rounded to bf16.
struct GeluBF16 {
  FASTVIT_INLINE f32v apply(f32v x) {
    const f32v t = at_most(abs(x), set1(40.0f));
    f32v p = set1(-2.9585566e-4f);
    p = fmadd(p, t, set1(5.6950792e-3f));
    p = fmadd(p, t, set1(-4.8323696e-2f));
    p = fmadd(p, t, set1(-4.6309716e-1f));
    p = fmadd(p, t, set1(-1.1500126f));
    p = fmadd(p, t, set1(-1.0000432f));
    return at_least(x, zero()) - t * exp2_bf16(p);
  }
};
#endif

// 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
  FASTVIT_INLINE f32v apply(f32v x) {
    constexpr float kTwoU = 2 * 0.79788456080286535588f * kLog2e;
    return gated_sigmoid(x, fmadd(x * x, set1(0.044715f * kTwoU), set1(kTwoU)));
  }
};

struct QuickGelu {
  FASTVIT_INLINE f32v apply(f32v x) { return gated_sigmoid(x, set1(1.702f * kLog2e)); }
};

struct Silu {
  FASTVIT_INLINE f32v apply(f32v x) { return gated_sigmoid(x, set1(kLog2e)); }
};

struct Relu {
  FASTVIT_INLINE f32v apply(f32v x) { return at_least(x, zero()); }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
