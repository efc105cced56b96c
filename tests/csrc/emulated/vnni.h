// AVX-VNNI's one instruction that csrc/cpu uses, spelled in AVX2. Included before anything else, it
// makes a build for avx2 one of the level avx_vnni.

#pragma once

#include <immintrin.h>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 fastvit_dpbusd

// c + four products of an unsigned by a signed byte, per lane of 32 bits. VPMADDUBSW would saturate
// sums of two, which the instruction does not: bytes of even and of odd places are widened first.
static inline __attribute__((always_inline)) __m256i fastvit_dpbusd(__m256i c, __m256i a,
                                                                    __m256i b) {
  const __m256i low = _mm256_set1_epi16(0xff);
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
}
