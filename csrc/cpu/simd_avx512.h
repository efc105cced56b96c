// The vector abstraction of AVX-512: simd.h includes it.

#pragma once

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int kLanes = 16;
constexpr int kVectors = 4;
using f32v = __m512;
typedef int32_t i32v __attribute__((vector_size(64), may_alias));

FASTVIT_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

FASTVIT_INLINE f32v zero() { return _mm512_setzero_ps(); }
FASTVIT_INLINE f32v set1(float x) { return _mm512_set1_ps(x); }
FASTVIT_INLINE f32v load(const float* p) { return _mm512_loadu_ps(p); }
FASTVIT_INLINE f32v load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
FASTVIT_INLINE void store(float* p, f32v v) { _mm512_storeu_ps(p, v); }
FASTVIT_INLINE void store(float* p, f32v v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

FASTVIT_INLINE f32v keep_first(f32v v, int64_t n) { return _mm512_maskz_mov_ps(first(n), v); }
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n, f32v others) {
  return _mm512_mask_mov_ps(others, first(n), v);
}

FASTVIT_INLINE f32v widen_bf16(__m256i half) {
  return _mm512_castsi512_ps(
      _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
}
FASTVIT_INLINE __m256i narrow_bf16(f32v v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd =
      _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
  return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, chosen, 16));
#endif
}
FASTVIT_INLINE f32v load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTVIT_INLINE f32v load(const bf16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
FASTVIT_INLINE void store(bf16* p, f32v v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
}
FASTVIT_INLINE void store(bf16* p, f32v v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v));
}
FASTVIT_INLINE f32v load(const uint8_t* p, int64_t n = kLanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first(n), p);
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
}

FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
FASTVIT_INLINE f32v fmadd_in_place(f32v a, f32v b, f32v c) { return fmadd(a, b, c); }
// Of two operands the hardware returns the second when either is NaN: `v` keeps its NaN.
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return _mm512_maskz_max_ps(0xffff, low, v); }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return _mm512_maskz_min_ps(0xffff, high, v); }
FASTVIT_INLINE f32v abs(f32v v) { return _mm512_abs_ps(v); }
FASTVIT_INLINE f32v nearest(f32v v) {
  return _mm512_maskz_roundscale_ps(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTVIT_INLINE i32v to_int(f32v v) { return (i32v)_mm512_maskz_cvtps_epi32(0xffff, v); }
FASTVIT_INLINE f32v to_float(i32v v) { return _mm512_maskz_cvtepi32_ps(0xffff, (__m512i)v); }
// The lowest byte of each lane.
FASTVIT_INLINE void store_bytes(void* p, i32v v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
}
// The lowest two bytes of each lane.
FASTVIT_INLINE void store_words(void* p, i32v v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v));
}
// x - floor(x), and 0 for infinities.
FASTVIT_INLINE f32v fraction(f32v x) { return _mm512_maskz_reduce_ps(0xffff, x, 9); }
// p * 2^floor(n)
FASTVIT_INLINE f32v scale_by_power(f32v p, f32v n) { return _mm512_maskz_scalef_ps(0xffff, p, n); }
// Of 32 numbers, those that the lowest five bits of each lane name.
FASTVIT_INLINE f32v look_up(const float (&table)[2 * kLanes], i32v index) {
  return _mm512_permutex2var_ps(load(table), (__m512i)index, load(table + kLanes));
}

FASTVIT_INLINE float reduce_add(f32v v) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
FASTVIT_INLINE float reduce_max(f32v v) {
  const __m256 half =
      _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

// Lanes 1, 0, 3, 2, ...
FASTVIT_INLINE f32v swap_pairs(f32v v) { return _mm512_maskz_permute_ps(0xffff, v, 0xb1); }

// v times the Hadamard matrix of kLanes rows: sums and differences of lanes 1, 2, 4 and 8 apart.
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  const auto signs = [](__mmask16 minus) __attribute__((always_inline)) {
    return _mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  };
  v = fmadd(v, signs(0xaaaa), swap_pairs(v));
  v = fmadd(v, signs(0xcccc), _mm512_maskz_permute_ps(0xffff, v, 0x4e));
  v = fmadd(v, signs(0xf0f0), _mm512_maskz_shuffle_f32x4(0xffff, v, v, 0xb1));
  return fmadd(v, signs(0xff00), _mm512_maskz_shuffle_f32x4(0xffff, v, v, 0x4e));
}

// r[i] holds row i; afterwards r[j] holds column j.
FASTVIT_INLINE void transpose(f32v (&r)[kLanes]) {
  f32v t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks inside 128-bit lanes
    const f32v a = _mm512_maskz_unpacklo_ps(0xffff, r[i], r[i + 1]);
    const f32v b = _mm512_maskz_unpackhi_ps(0xffff, r[i], r[i + 1]);
    const f32v c = _mm512_maskz_unpacklo_ps(0xffff, r[i + 2], r[i + 3]);
    const f32v d = _mm512_maskz_unpackhi_ps(0xffff, r[i + 2], r[i + 3]);
    t[i] = _mm512_maskz_shuffle_ps(0xffff, a, c, 0x44);
    t[i + 1] = _mm512_maskz_shuffle_ps(0xffff, a, c, 0xee);
    t[i + 2] = _mm512_maskz_shuffle_ps(0xffff, b, d, 0x44);
    t[i + 3] = _mm512_maskz_shuffle_ps(0xffff, b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // then the 128-bit lanes themselves, as a 4 x 4 transpose
    const f32v a = _mm512_maskz_shuffle_f32x4(0xffff, t[j], t[j + 4], 0x88);
    const f32v b = _mm512_maskz_shuffle_f32x4(0xffff, t[j], t[j + 4], 0xdd);
    const f32v c = _mm512_maskz_shuffle_f32x4(0xffff, t[j + 8], t[j + 12], 0x88);
    const f32v d = _mm512_maskz_shuffle_f32x4(0xffff, t[j + 8], t[j + 12], 0xdd);
    r[j] = _mm512_maskz_shuffle_f32x4(0xffff, a, c, 0x88);
    r[j + 8] = _mm512_maskz_shuffle_f32x4(0xffff, a, c, 0xdd);
    r[j + 4] = _mm512_maskz_shuffle_f32x4(0xffff, b, d, 0x88);
    r[j + 12] = _mm512_maskz_shuffle_f32x4(0xffff, b, d, 0xdd);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
