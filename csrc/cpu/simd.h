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

#if defined(__aarch64__)
}  // namespace fastvit::cpu::FASTVIT_ISA

#include "simd_neon.h"

namespace fastvit::cpu::FASTVIT_ISA {

#elif defined(__AVX512F__)

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
// p * 2^n for whole n; underflows to zero.
// x - floor(x), and 0 for infinities.
FASTVIT_INLINE f32v fraction(f32v x) { return _mm512_maskz_reduce_ps(0xffff, x, 9); }
// p * 2^floor(n)
FASTVIT_INLINE f32v scale_by_power(f32v p, f32v n) { return _mm512_maskz_scalef_ps(0xffff, p, n); }
constexpr float kLowestPower = -160.0f;

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

#else  // AVX2 and plain C++ share everything that GCC's vector extension can say.

#if defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kVectors = 2;
using f32v = __m256;
typedef int32_t i32v __attribute__((vector_size(32), may_alias));

FASTVIT_INLINE f32v load(const float* p) { return _mm256_loadu_ps(p); }
FASTVIT_INLINE void store(float* p, f32v v) { _mm256_storeu_ps(p, v); }
FASTVIT_INLINE f32v set1(float x) { return _mm256_set1_ps(x); }
FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return _mm256_max_ps(low, v); }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return _mm256_min_ps(high, v); }
FASTVIT_INLINE i32v to_int(f32v v) { return (i32v)_mm256_cvtps_epi32(v); }
FASTVIT_INLINE f32v load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTVIT_INLINE f32v load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTVIT_INLINE f32v to_float(i32v v) { return _mm256_cvtepi32_ps((__m256i)v); }
FASTVIT_INLINE f32v swap_pairs(f32v v) { return _mm256_permute_ps(v, 0xb1); }
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  v = fmadd(v, f32v{1, -1, 1, -1, 1, -1, 1, -1}, swap_pairs(v));
  v = fmadd(v, f32v{1, 1, -1, -1, 1, 1, -1, -1}, _mm256_permute_ps(v, 0x4e));
  return fmadd(v, f32v{1, 1, 1, 1, -1, -1, -1, -1}, _mm256_permute2f128_ps(v, v, 0x01));
}

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

#else

constexpr int kLanes = 4;
constexpr int kVectors = 2;
typedef float f32v __attribute__((vector_size(16), may_alias));
typedef int32_t i32v __attribute__((vector_size(16), may_alias));

FASTVIT_INLINE f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTVIT_INLINE void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
FASTVIT_INLINE f32v set1(float x) { return f32v{x, x, x, x}; }
FASTVIT_INLINE f32v fmadd(f32v a, f32v b, f32v c) { return a * b + c; }
FASTVIT_INLINE f32v at_least(f32v v, f32v low) { return v < low ? low : v; }
FASTVIT_INLINE f32v at_most(f32v v, f32v high) { return v > high ? high : v; }
FASTVIT_INLINE i32v to_int(f32v v) { return __builtin_convertvector(v, i32v); }
FASTVIT_INLINE f32v to_float(i32v v) { return __builtin_convertvector(v, f32v); }
FASTVIT_INLINE f32v swap_pairs(f32v v) { return f32v{v[1], v[0], v[3], v[2]}; }
FASTVIT_INLINE f32v hadamard_lanes(f32v v) {
  v = f32v{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
  return f32v{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
}
FASTVIT_INLINE f32v load(const bf16* p) {
  return f32v{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])};
}
FASTVIT_INLINE f32v load(const uint8_t* p) {
  return f32v{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])};
}

FASTVIT_INLINE void transpose(f32v (&r)[kLanes]) {
  const f32v a = r[0], b = r[1], c = r[2], d = r[3];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) r[j] = f32v{a[j], b[j], c[j], d[j]};
}

#endif

FASTVIT_INLINE f32v zero() { return set1(0.0f); }
FASTVIT_INLINE f32v abs(f32v v) { return (f32v)((i32v)v & 0x7fffffff); }

// Tails go through a buffer: they are rare, and a mask costs the common case.
template <class T>
FASTVIT_INLINE f32v load(const T* p, int64_t n) {
  float buffer[kLanes] = {};
  for (int i = 0; i < n && i < kLanes; ++i) buffer[i] = to_f32(p[i]);
  return load(buffer);
}
FASTVIT_INLINE void store(float* p, f32v v, int64_t n) {
  float buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = buffer[i];
}
FASTVIT_INLINE void store(bf16* p, f32v v, int64_t n) {
  float buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = to_bf16(buffer[i]);
}
FASTVIT_INLINE void store(bf16* p, f32v v) { store(p, v, kLanes); }
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n, f32v others) {
  float buffer[kLanes];
  store(buffer, others);
  store(buffer, v, n);
  return load(buffer);
}
FASTVIT_INLINE f32v keep_first(f32v v, int64_t n) { return keep_first(v, n, zero()); }

FASTVIT_INLINE void store_bytes(void* p, i32v v) {
  for (int i = 0; i < kLanes; ++i) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(v[i]);
}
FASTVIT_INLINE void store_words(void* p, i32v v) {
  for (int i = 0; i < kLanes; ++i) static_cast<int16_t*>(p)[i] = static_cast<int16_t>(v[i]);
}

// Adding 1.5 * 2^23 leaves no bits for a fraction; right for |v| < 2^22.
FASTVIT_INLINE f32v nearest(f32v v) {
  const f32v magic = set1(12582912.0f);
  return (v + magic) - magic;
}
FASTVIT_INLINE f32v scale_by_power(f32v p, f32v n) {
  const i32v exponent = (to_int(n) + 127) << 23;
  return n < set1(-126.0f) ? zero() : p * (f32v)exponent;
}
constexpr float kLowestPower = -127.0f;

FASTVIT_INLINE float reduce_add(f32v v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
FASTVIT_INLINE float reduce_max(f32v v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

#endif

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
