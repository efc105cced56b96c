// The micro-kernel by AMX tiles: up to 32 x 32 sums, rows of A times a packed panel of B.

#pragma once

#include "products.h"

namespace fastvit::cpu::FASTVIT_ISA {

template <bool kStream, int T>
FASTVIT_INLINE void load_one(const void* rows, int64_t stride) {
  if constexpr (kStream) {
    amx::stream_tile<T>(rows, stride);
  } else {
    amx::load_tile<T>(rows, stride);
  }
}

// c[16 R][16 C] (+)= a[16 R][16 blocks] * b[16 blocks][16 C], in blocks of P::kSteps steps. C takes
// tiles 0 to 3, A 4 and 5, B 6 and 7. There is room for rows that don't exist. Rows of c are `ldc`
// floats apart; sums of integers stay integers.
//
// 2 x 2 tiles take four products, of 16 cycles each, for four loads. One of A and B is in L1, and
// stays there because the other one passes by on its way from L2: with plain loads of both, the
// loop of a large product takes 1.3 times as long (measured on a Xeon with 2 MiB of L2).
//
// visit() is called twice a block. What it does costs little of the time that it takes by itself:
// vectors have nothing to do while tiles are multiplied.
template <class P, bool kStreamA, int R, int C, class Visit>
FASTVIT_INLINE void multiply_tiles(int64_t blocks, const typename P::Element* a, int64_t lda,
                                   const typename P::Element* b, float* c, int64_t ldc,
                                   bool accumulate, const Visit& visit) {
  constexpr int64_t kTileRows = 16, kDepth = P::kSteps * P::kPair, kWide = C * kLanes * P::kPair;
  constexpr int64_t kBytesB = kWide * static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t c_bytes = ldc * static_cast<int64_t>(sizeof(float));
  float* below = c + kTileRows * ldc;
  if (accumulate) {
    amx::load_tile<0>(c, c_bytes);
    if constexpr (C == 2) amx::load_tile<1>(c + kLanes, c_bytes);
    if constexpr (R == 2) amx::load_tile<2>(below, c_bytes);
    if constexpr (R == 2 && C == 2) amx::load_tile<3>(below + kLanes, c_bytes);
  } else {
    amx::zero_tile<0>();
    if constexpr (C == 2) amx::zero_tile<1>();
    if constexpr (R == 2) amx::zero_tile<2>();
    if constexpr (R == 2 && C == 2) amx::zero_tile<3>();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    load_one<kStreamA, 4>(a, a_bytes);
    load_one<!kStreamA, 6>(b, kBytesB);
    P::template dot<0, 4, 6>();
    if constexpr (C == 2) {
      load_one<!kStreamA, 7>(b + kLanes * P::kPair, kBytesB);
      P::template dot<1, 4, 7>();
    }
    visit();
    if constexpr (R == 2) {
      load_one<kStreamA, 5>(a + kTileRows * lda, a_bytes);
      P::template dot<2, 5, 6>();
      if constexpr (C == 2) P::template dot<3, 5, 7>();
    }
    visit();
    a += kDepth;
    b += P::kSteps * kWide;
  }
  amx::store_tile<0>(c, c_bytes);
  if constexpr (C == 2) amx::store_tile<1>(c + kLanes, c_bytes);
  if constexpr (R == 2) amx::store_tile<2>(below, c_bytes);
  if constexpr (R == 2 && C == 2) amx::store_tile<3>(below + kLanes, c_bytes);
}

// A panel of B in L1, A from L2, and something to do meanwhile.
template <class P, int R, int C, class Visit>
static void tile_kernel(int64_t blocks, const typename P::Element* a, int64_t lda,
                        const typename P::Element* b, float* c, int64_t ldc, bool accumulate,
                        Visit& visit) {
  multiply_tiles<P, true, R, C>(blocks, a, lda, b, c, ldc, accumulate, [&] { visit(); });
}

// A in L1, B from L2.
template <class P, int R, int C>
static void tile_kernel(int64_t blocks, const typename P::Element* a, int64_t lda,
                        const typename P::Element* b, float* c, int64_t ldc, bool accumulate) {
  multiply_tiles<P, false, R, C>(blocks, a, lda, b, c, ldc, accumulate, [] {});
}

// The kernel for 1 to 32 rows and one or two vectors of columns.
template <class P, class... Visit>
FASTVIT_INLINE auto tile_kernel_for(int64_t rows, int64_t vectors) {
  using Element = typename P::Element;
  using Function = void (*)(int64_t blocks, const Element* a, int64_t lda, const Element* b,
                            float* c, int64_t ldc, bool accumulate, Visit&... visit);
  static constexpr Function kTable[2][2] = {
      {tile_kernel<P, 1, 1, Visit...>, tile_kernel<P, 1, 2, Visit...>},
      {tile_kernel<P, 2, 1, Visit...>, tile_kernel<P, 2, 2, Visit...>}};
  return kTable[rows > 16][vectors - 1];
}

}  // namespace fastvit::cpu::FASTVIT_ISA
