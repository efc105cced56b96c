// The vector abstraction of AVX2: simd.h includes it.

#pragma once

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int kLanes = 8;
constexpr int kVectors = 2;
using f32v = __m256;
typedef int32_t i32v __attribute__((vector_size(32), may_alias));

// All bits of the first n lanes.
FASTVIT_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTVIT_INLINE f32v zero() { return _mm256_setzero_ps(); }
FASTVIT_INLINE f32v set1(float x) { return _mm256_set1_ps(x); }

FASTVIT_INLINE f32v widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FASTVIT_INLINE __m128i narrow_bf16(f32v v) {  // round to nearest even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

FASTVIT_INLINE f32v load(const float* p) { return _mm256_loadu_ps(p); }
FASTVIT_INLINE f32v load(const bf16* p) {
  return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTVIT_INLINE f32v load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTVIT_INLINE void store(float* p, f32v v) { _mm256_storeu_ps(p, v); }
FASTVIT_INLINE void store(bf16* p, f32v v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
}

// Tails: a mask reads floats; all else goes through a buffer, because no mask reads halves, and
// AMD's cores take tens of cycles to write by one.
FASTVIT_INLINE f32v load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
template <class T>
FASTVIT_INLINE f32v load(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int i = 0; i < n && i < kLanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FASTVIT_INLINE void store(T* p, f32v v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = buffer[i];
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n, f32v others) {
  return _mm256_blendv_ps(others, v, _mm256_castsi256_ps(first(n)));
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(first(n)));
}

FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
// The same in the register of c. GCC chooses among the instruction's three forms so that the sums
// of a micro-kernel move about, which costs 3 % of a product.
FASTVIT_INLINE f32v fmadd_in_place(f32v a, f32v b, f32v c) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  return c;
}
// Of two operands the hardware returns the second when either is NaN: `v` keeps its NaN.
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return _mm256_max_ps(low, v); }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return _mm256_min_ps(high, v); }
FASTVIT_INLINE f32v abs(f32v v) { return _mm256_andnot_ps(set1(-0.0f), v); }
FASTVIT_INLINE f32v nearest(f32v v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTVIT_INLINE i32v to_int(f32v v) { return (i32v)_mm256_cvtps_epi32(v); }
FASTVIT_INLINE f32v to_float(i32v v) { return _mm256_cvtepi32_ps((__m256i)v); }
// The lowest byte of each lane.
FASTVIT_INLINE void store_bytes(void* p, i32v v) {
  const __m256i lowest = _mm256_set1_epi32(0x0c080400);  // of each half, four bytes
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, lowest);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}
// The lowest two bytes of each lane.
FASTVIT_INLINE void store_words(void* p, i32v v) {
  const __m256i lowest = _mm256_set1_epi64x(0x0d0c090805040100);  // of each half, four words
  const __m256i words = _mm256_shuffle_epi8((__m256i)v, lowest);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_unpacklo_epi64(low, high));
}

FASTVIT_INLINE float reduce_add(f32v v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
FASTVIT_INLINE float reduce_max(f32v v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

FASTVIT_INLINE f32v swap_pairs(f32v v) { return _mm256_permute_ps(v, 0xb1); }
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  v = fmadd(v, f32v{1, -1, 1, -1, 1, -1, 1, -1}, swap_pairs(v));
  v = fmadd(v, f32v{1, 1, -1, -1, 1, 1, -1, -1}, _mm256_permute_ps(v, 0x4e));
  return fmadd(v, f32v{1, 1, 1, 1, -1, -1, -1, -1}, _mm256_permute2f128_ps(v, v, 0x01));
}

// r[i] holds row i; afterwards r[j] holds column j.
FASTVIT_INLINE void transpose(f32v (&r)[kLanes]) {
  f32v t[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const f32v a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const f32v c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
    const f32v d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x20);
    r[j + 4] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x31);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
