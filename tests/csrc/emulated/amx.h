// The functions of csrc/cpu/amx.h in plain C++, for machines without AMX. What the instructions
// refuse ends the program: tiles of a thread that has none, and a release of none.

#pragma once

#include <cstdlib>
#include <cstring>

namespace fastvit::cpu::FASTVIT_ISA::amx {

union Tile {
  char bytes[16][64];
  float f32[16][16];
  int32_t i32[16][16];
  uint16_t bf16[16][32];
  int8_t i8[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

static Tile& tile(int i) {
  if (!configured) std::abort();
  return tiles[i];
}

static inline void configure() {
  if (configured) std::abort();  // allowed, but once per thread and region is what is wanted
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
static inline void release() {
  if (!configured) std::abort();
  configured = false;
}

template <int T>
static void zero_tile() {
  std::memset(&tile(T), 0, sizeof(Tile));
}
template <int T>
static void load_tile(const void* rows, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    std::memcpy(tile(T).bytes[i], static_cast<const char*>(rows) + i * stride, 64);
  }
}
template <int T>
static void stream_tile(const void* rows, int64_t stride) {
  load_tile<T>(rows, stride);
}
template <int T>
static void store_tile(void* rows, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(rows) + i * stride, tile(T).bytes[i], 64);
  }
}

static inline float flushed(float x) {  // denormals count as zero, going in and coming out
  return std::abs(x) < __FLT_MIN__ ? 0.0f : x;
}
static inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

// Intel's description of TDPBF16PS: the 16 products of first elements and those of second elements
// are summed apart, each by fused multiply-adds, before both meet and are added to C.
template <int C, int A, int B>
static void dot_bf16() {
  const Tile &a = tile(A), &b = tile(B);
  Tile& c = tile(C);
  for (int m = 0; m < 16; ++m) {
    float sums[32] = {};
    for (int k = 0; k < 16; ++k) {
      const float pair[2] = {widened(a.bf16[m][2 * k]), widened(a.bf16[m][2 * k + 1])};
      for (int i = 0; i < 32; ++i) {
        sums[i] = flushed(__builtin_fmaf(pair[i % 2], widened(b.bf16[k][i]), sums[i]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      c.f32[m][n] = flushed(flushed(c.f32[m][n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
    }
  }
}
template <int C, int A, int B>
static void dot_i8() {
  const Tile &a = tile(A), &b = tile(B);
  Tile& c = tile(C);
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 64; ++i) c.i32[m][i / 4] += a.i8[m][4 * k + i % 4] * b.i8[k][i];
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA::amx
