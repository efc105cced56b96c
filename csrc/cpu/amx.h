// AMX: eight registers ("tiles") of 16 rows x 64 bytes, and the products of two of them that are
// added to a third. products.h includes it at levels that have them.
//
// Compilers don't know tiles as values, so a tile is named by its number, and the instructions are
// spelled out: the intrinsics of GCC 12 don't say that they read or write memory.

#pragma once

#if defined(FASTVIT_AMX_STAND_IN)
#include FASTVIT_AMX_STAND_IN  // the same functions without the instructions, for tests
#else

namespace fastvit::cpu::FASTVIT_ISA::amx {

// All eight tiles at their full size. Until a thread has said so, it has none.
FASTVIT_INLINE void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof config == 64, "the layout is the processor's");
  asm volatile("ldtilecfg %0" : : "m"(config));
}
// Tiles that hold nothing are not saved when the thread is switched.
FASTVIT_INLINE void release() { asm volatile("tilerelease"); }

template <int T>
FASTVIT_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows are `stride` bytes apart.
template <int T>
FASTVIT_INLINE void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}
// Past L1, which keeps what is read again: for rows that are read once in a while.
template <int T>
FASTVIT_INLINE void stream_tile(const void* rows, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTVIT_INLINE void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}

// C (16 x 16 of 32 bits) += A (16 rows, 16 steps) * B (16 steps, 16 columns). A step is 32 bits,
// two bf16 or four signed bytes: C is float or int32_t.
template <int C, int A, int B>
FASTVIT_INLINE void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
FASTVIT_INLINE void dot_i8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace fastvit::cpu::FASTVIT_ISA::amx

#endif
