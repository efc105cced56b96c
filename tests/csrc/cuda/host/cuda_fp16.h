// Half precision on the host, rounded to nearest, ties to even.

#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return __uint_as_float(sign | 0x7f800000u | magnitude);
  // The product moves the exponent, and makes subnormal numbers normal.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // The last place of 0.5 is that of subnormal half precision.
    magnitude = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | magnitude)};
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13)};
}
