// Product traits: what a micro-kernel multiplies, and how, at each instruction set.
//
// A product reads A row by row and B as panels. One step consumes kPair consecutive k: `Unit` lanes
// of 32 bits hold one f32, or two bf16 that the instruction multiplies and adds at once.

#pragma once

#include "simd.h"

#if defined(__AMX_TILE__) || defined(FASTVIT_AMX_STAND_IN)
#define FASTVIT_TILES 1
#include "amx.h"
#endif
#if defined(__aarch64__)
#include "products_neon.h"
#endif

namespace fastvit::cpu::FASTVIT_ISA {

// What the loops around a micro-kernel of vectors know of it.
struct ByVectors {
  static constexpr bool kTiles = false;
  static constexpr int kRows = 6;          // rows that it finishes at once
  static constexpr int kWidth = kVectors;  // vectors of columns, of a panel
  static constexpr int kSteps = 1;         // steps that it takes at once
  // What packing a panel costs, in rows of product (measured: 10 on Zen 5, 4.5 on Zen 4, whose
  // products take twice as long).
  static constexpr double kPackRows = 10;
  // GCC would move sums from register to register where registers are few, and adds integers of
  // several steps up before it adds them to a sum, for which no number of registers is enough.
  static constexpr bool kHoldsSums = kVectors == 2;
  struct Registers {};  // what a thread holds that uses it
};

#if defined(FASTVIT_TILES)
// A product by tiles: packed rows and panels are those of the product by vectors, P, but for zeros
// up to whole blocks of kSteps, because a tile can't be loaded in part.
template <class P>
struct ByTiles : P {
  static constexpr bool kTiles = true;
  static constexpr int kRows = 32, kWidth = 2, kSteps = 16;
  static constexpr double kPackRows = 80;  // packing costs the same, and a row of product an eighth
  struct Registers {
    FASTVIT_INLINE_METHOD Registers() { amx::configure(); }
    FASTVIT_INLINE_METHOD ~Registers() { amx::release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
  };
};
constexpr int kMostRows = 32;  // of any product
#else
constexpr int kMostRows = ByVectors::kRows;
#endif

struct FloatAccumulators : ByVectors {
  using Accumulator = f32v;
  static constexpr bool kQuantized = false;
  static constexpr bool kHasSums = false;
};

struct ProductF32 : FloatAccumulators {
  using Element = float;
  using Unit = f32v;
  static constexpr int kPair = 1;

  FASTVIT_INLINE Unit load_unit(const float* p) { return load(p); }
#if defined(__aarch64__)
  FASTVIT_INLINE Unit broadcast(const float* p) { return load_first(p); }
  FASTVIT_INLINE f32v mac(Unit a, Unit b, f32v c) { return fmadd_first(a, b, c); }
  FASTVIT_INLINE f32v mac_lanes(Unit a, Unit b, f32v c) { return fmadd(a, b, c); }
#else
  FASTVIT_INLINE Unit broadcast(const float* p) { return set1(*p); }
  FASTVIT_INLINE f32v mac(Unit a, Unit b, f32v c) { return fmadd_in_place(a, b, c); }
#endif

  // kLanes steps of one row of B, as 32-bit lanes; `n` elements of it exist.
  template <class T>
  FASTVIT_INLINE f32v load_steps(const T* p, int64_t n) {
    return n >= kLanes ? load(p) : load(p, n);
  }

  // One step of kLanes columns from one row, `n` of which exist.
  template <class T>
  FASTVIT_INLINE f32v load_pairs(const T* a, const T*, int64_t n) {
    return load_steps(a, n);
  }
};

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct VectorBF16 : FloatAccumulators, ProductBfdot {};
#elif defined(__AVX512BF16__)
struct VectorBF16 : FloatAccumulators {
  using Element = bf16;
  using Unit = __m512bh;
  static constexpr int kPair = 2;

  FASTVIT_INLINE Unit load_unit(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTVIT_INLINE Unit broadcast(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FASTVIT_INLINE f32v mac(Unit a, Unit b, f32v c) { return _mm512_dpbf16_ps(c, a, b); }

  FASTVIT_INLINE f32v load_steps(const bf16* p, int64_t n) {
    if (n >= 2 * kLanes) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  FASTVIT_INLINE f32v load_steps(const float* p, int64_t n) {
    f32v low, high;
    if (n >= 2 * kLanes) {
      low = load(p), high = load(p + kLanes);
    } else {
      low = load(p, min(n, kLanes)), high = load(p + kLanes, max(n - kLanes, 0));
    }
    return (f32v)_mm512_cvtne2ps_pbh(high, low);
  }

  // One step of kLanes columns from two rows: lane i is (a[i], b[i]), `n` of which exist.
  FASTVIT_INLINE f32v load_pairs(const bf16* a, const bf16* b, int64_t n) {
    const __mmask16 exist = n >= kLanes ? 0xffff : first(n);
    const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(exist, a));
    if (b == nullptr) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(exist, b));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16)));
  }
  FASTVIT_INLINE f32v load_pairs(const float* a, const float* b, int64_t n) {
    const __mmask16 exist = n >= kLanes ? 0xffff : first(n);
    const f32v low = _mm512_maskz_loadu_ps(exist, a);
    const f32v high = b == nullptr ? zero() : _mm512_maskz_loadu_ps(exist, b);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(~0u, order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }
};
#else
using VectorBF16 = ProductF32;  // without the instruction, bf16 inputs are multiplied as f32
#endif

#if defined(FASTVIT_TILES)
struct ProductBF16 : ByTiles<VectorBF16> {
  template <int C, int A, int B>
  FASTVIT_INLINE void dot() {
    amx::dot_bf16<C, A, B>();
  }
};
#else
using ProductBF16 = VectorBF16;
#endif

struct IntAccumulators : ByVectors {
  using Accumulator = i32v;
  static constexpr bool kQuantized = true;

  FASTVIT_INLINE f32v bits(i32v v) { return (f32v)v; }
};

#if defined(FASTVIT_TILES)
// TDPBSSD multiplies signed by signed bytes: nothing to shift, no sums.
struct Bytes : IntAccumulators {
  using Element = int8_t;
  static constexpr int kPair = 4;
  static constexpr bool kHasSums = false;

  FASTVIT_INLINE void store_row(Element* p, i32v v) { store_bytes(p, v); }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 4 * kLanes) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p));
  }
};
struct ProductI8 : ByTiles<Bytes> {
  template <int C, int A, int B>
  FASTVIT_INLINE void dot() {
    amx::dot_i8<C, A, B>();
  }
};
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// The instruction multiplies unsigned by signed bytes, so A is shifted up by 128, and the product
// that adds is taken off again: a panel brings -128 times the sum of each of its columns.
struct ProductI8 : IntAccumulators {
  using Element = int8_t;
  static constexpr int kPair = 4;
  static constexpr bool kHasSums = true;
  static constexpr int kShift = 128;

#if defined(__AVX512VNNI__)
  using Unit = __m512i;
  FASTVIT_INLINE Unit load_unit(const Element* p) { return _mm512_loadu_si512(p); }
  FASTVIT_INLINE Unit all(int32_t four) { return _mm512_set1_epi32(four); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) {
    return (i32v)_mm512_dpbusd_epi32((__m512i)c, a, b);
  }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 4 * kLanes) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p));
  }
#else
  using Unit = __m256i;
  FASTVIT_INLINE Unit load_unit(const Element* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  FASTVIT_INLINE Unit all(int32_t four) { return _mm256_set1_epi32(four); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) {
    return (i32v)_mm256_dpbusd_avx_epi32((__m256i)c, a, b);
  }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 4 * kLanes) return _mm256_castsi256_ps(load_unit(p));
    int8_t some[4 * kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return _mm256_castsi256_ps(load_unit(some));
  }
#endif

  FASTVIT_INLINE Unit broadcast(const Element* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return all(four);
  }
  FASTVIT_INLINE Unit ones() { return all(0x01010101); }
  FASTVIT_INLINE void store_row(Element* p, i32v v) { store_bytes(p, v + kShift); }
};
#elif defined(__aarch64__)
struct ProductI8 : IntAccumulators, ProductOfIntegers {};
#else
// Without byte instructions the products are of 16 bits, two to a step, which no sum overflows.
struct ProductI8 : IntAccumulators {
  using Element = int16_t;
  static constexpr int kPair = 2;
  static constexpr bool kHasSums = false;
  static constexpr bool kHoldsSums = true;

#if defined(__AVX512F__)
  using Unit = __m512i;
  FASTVIT_INLINE Unit load_unit(const Element* p) { return _mm512_loadu_si512(p); }
  FASTVIT_INLINE Unit all(int32_t two) { return _mm512_set1_epi32(two); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) { return c + (i32v)_mm512_madd_epi16(a, b); }
  FASTVIT_INLINE f32v widen(const int8_t* p) {
    return _mm512_castsi512_ps(
        _mm512_maskz_cvtepi8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
#elif defined(__AVX2__)
  using Unit = __m256i;
  FASTVIT_INLINE Unit load_unit(const Element* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  FASTVIT_INLINE Unit all(int32_t two) { return _mm256_set1_epi32(two); }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) { return c + (i32v)_mm256_madd_epi16(a, b); }
  FASTVIT_INLINE f32v widen(const int8_t* p) {
    return _mm256_castsi256_ps(
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#else
  using Unit = i32v;
  FASTVIT_INLINE Unit load_unit(const Element* p) {
    Unit v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  FASTVIT_INLINE Unit all(int32_t two) { return Unit{two, two, two, two}; }
  FASTVIT_INLINE i32v mac(Unit a, Unit b, i32v c) {
    return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
  }
  FASTVIT_INLINE f32v widen(const int8_t* p) {
    int16_t wide[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) wide[i] = p[i];
    return bits(load_unit(wide));
  }
#endif

  FASTVIT_INLINE Unit broadcast(const Element* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return all(two);
  }
  FASTVIT_INLINE void store_row(Element* p, i32v v) { store_words(p, v); }
  FASTVIT_INLINE f32v load_steps(const int8_t* p, int64_t n) {
    if (n >= 2 * kLanes) return widen(p);
    int8_t some[2 * kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return widen(some);
  }
};
#endif

}  // namespace fastvit::cpu::FASTVIT_ISA
