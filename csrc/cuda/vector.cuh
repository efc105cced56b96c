// Loads and stores of f32, bf16 and f16 as f32 registers, 16 bytes at a time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace fastvit::cuda {

// What one thread holds of a row: 16 bytes of bf16 and f16, 32 of f32.
constexpr int kVector = 8;

struct alignas(16) Chunk {
  uint32_t word[4];
};

__device__ __forceinline__ float low_half(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
}

__device__ __forceinline__ float high_half(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  return __half_as_ushort(__float2half_rn(low)) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

// kCount is kVector, which needs 16-byte alignment, or 1. The dtype is the same for all threads, so
// the branch costs a comparison, and one kernel serves every mixture of dtypes.
template <int kCount>
__device__ __forceinline__ void load(const Array& array, int64_t at, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    if (array.dtype == DType::kF32) {
      values[0] = static_cast<const float*>(array.data)[at];
    } else {
      const uint32_t bits = static_cast<const uint16_t*>(array.data)[at];
      values[0] = array.dtype == kF16 ? low_half(bits) : __uint_as_float(bits << 16);
    }
  } else if (array.dtype == DType::kF32) {
    const Chunk* chunks =
        reinterpret_cast<const Chunk*>(static_cast<const float*>(array.data) + at);
    const Chunk first = chunks[0], second = chunks[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = __uint_as_float(first.word[i]);
      values[4 + i] = __uint_as_float(second.word[i]);
    }
  } else {
    const Chunk chunk =
        *reinterpret_cast<const Chunk*>(static_cast<const uint16_t*>(array.data) + at);
    if (array.dtype == kF16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[2 * i] = low_half(chunk.word[i]);
        values[2 * i + 1] = high_half(chunk.word[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[2 * i] = __uint_as_float(chunk.word[i] << 16);
        values[2 * i + 1] = __uint_as_float(chunk.word[i] & 0xffff0000u);
      }
    }
  }
}

// As load, but absent arrays read as `otherwise`.
template <int kCount>
__device__ __forceinline__ void load_or(const Array& array, int64_t at, float otherwise,
                                        float (&values)[kCount]) {
  if (array.data != nullptr) {
    load(array, at, values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = otherwise;
  }
}

template <int kCount>
__device__ __forceinline__ void store(const Array& array, int64_t at,
                                      const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    if (array.dtype == DType::kF32) {
      static_cast<float*>(array.data)[at] = values[0];
    } else {
      const uint32_t bits =
          array.dtype == kF16 ? pack_f16(values[0], 0.0f) : pack_bf16(values[0], 0.0f);
      static_cast<uint16_t*>(array.data)[at] = static_cast<uint16_t>(bits);
    }
  } else if (array.dtype == DType::kF32) {
    Chunk* chunks = reinterpret_cast<Chunk*>(static_cast<float*>(array.data) + at);
    Chunk first, second;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first.word[i] = __float_as_uint(values[i]);
      second.word[i] = __float_as_uint(values[4 + i]);
    }
    chunks[0] = first;
    chunks[1] = second;
  } else {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      chunk.word[i] = array.dtype == kF16 ? pack_f16(values[2 * i], values[2 * i + 1])
                                          : pack_bf16(values[2 * i], values[2 * i + 1]);
    }
    *reinterpret_cast<Chunk*>(static_cast<uint16_t*>(array.data) + at) = chunk;
  }
}

}  // namespace fastvit::cuda
