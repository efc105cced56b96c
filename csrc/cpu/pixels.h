// Interleaved pixels (RGBRGB..., RGBARGBA...: what image decoders write) as vectors.
//
// A vector holds kLanes pixels, a pixel in each 32-bit lane with its first channel lowest. Three
// bytes a pixel are first spread to four: the shuffles below need AVX2 or AVX-512BW, not VBMI.

#pragma once

#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

// From kLanes pixels of kStep bytes at p, of which only the first `bytes` bytes are read.
#if defined(__AVX512F__)

using Pixels = __m512i;

template <int kStep>
FASTVIT_INLINE Pixels load_pixels(const uint8_t* p, int64_t bytes) {
  static_assert(kStep == 3 || kStep == 4);
  const __m512i v = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - bytes), p);
  if constexpr (kStep == 4) return v;
  // Four pixels, three dwords, to each 128-bit lane; then three bytes to each dword.
  const __m512i dwords = _mm512_set_epi32(0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
  const __m512i spread = _mm512_set4_epi32(0x800b0a09, 0x80080706, 0x80050403, 0x80020100);
  return _mm512_maskz_shuffle_epi8(~uint64_t{0}, _mm512_maskz_permutexvar_epi32(0xffff, dwords, v),
                                   spread);
}

FASTVIT_INLINE f32v channel_of(Pixels pixels, unsigned c) {
  const __m512i low = _mm512_maskz_srli_epi32(0xffff, pixels, 8 * c);
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_and_si512(low, _mm512_set1_epi32(0xff)));
}

#elif defined(__AVX2__)

using Pixels = __m256i;

template <int kStep>
FASTVIT_INLINE Pixels load_pixels(const uint8_t* p, int64_t bytes) {
  static_assert(kStep == 3 || kStep == 4);
  uint8_t tail[kStep * kLanes];
  if (bytes < kStep * kLanes) {
    for (int64_t i = 0; i < kStep * kLanes; ++i) tail[i] = i < bytes ? p[i] : 0;
    p = tail;
  }
  if constexpr (kStep == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // The second half ends, rather than begins, with its 12 bytes: nothing beyond 24 is read.
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                          4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
  return _mm256_shuffle_epi8(_mm256_set_m128i(high, low), spread);
}

FASTVIT_INLINE f32v channel_of(Pixels pixels, unsigned c) {
  const __m256i low = _mm256_srli_epi32(pixels, static_cast<int>(8 * c));
  return _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(0xff)));
}

#else

using Pixels = i32v;

template <int kStep>
FASTVIT_INLINE Pixels load_pixels(const uint8_t* p, int64_t bytes) {
  static_assert(kStep == 3 || kStep == 4);
  Pixels pixels = {};
  for (int64_t i = 0; i < bytes; ++i) pixels[i / kStep] |= p[i] << (i % kStep * 8);
  return pixels;
}

FASTVIT_INLINE f32v channel_of(Pixels pixels, unsigned c) {
  return __builtin_convertvector(pixels >> static_cast<int>(8 * c) & 0xff, f32v);
}

#endif

}  // namespace fastvit::cpu::FASTVIT_ISA
