// The micro-kernel: a tile of at most P::kRows x kPanel sums, rows of A times a packed panel of B.

#pragma once

#include "products.h"
#include "rows.h"

namespace fastvit::cpu::FASTVIT_ISA {

// What the micro-kernel fetches in passing, a little every kUnroll steps, because all at once would
// stall.

// Into L1, towards the end, for writing: this tile, which a panel's passing has driven out, and
// what its epilogue will write or read. Stores retire in order, so each one that missed L1 would
// hold up the next tile's.
struct PrefetchTile {
  static constexpr int kUnroll = 8;
  // How many times kUnroll steps the tile's last row comes before the end: some 400 cycles, in
  // which it arrives from L3, and soon enough not to be gone again from L1.
  static constexpr int kLead = 4;

  Tiles tiles = {};

  template <class P, int MR>
  FASTVIT_INLINE_METHOD void at(int64_t s, int64_t steps, const typename P::Element*,
                                int64_t) const {
    const int64_t row = (steps - s) / kUnroll - 1 - kLead;
    if (row < 0 || row >= MR) return;
    for (const TileRows& tile : tiles) {
      const char* line = tile.rows + row * tile.ld;
      for (int64_t b = 0; b < tile.bytes; b += 64) __builtin_prefetch(line + b, 1, 3);
    }
  }
};

// Into L2 as well: the P::kRows of A that come next, and the weights that will be packed next (at
// step s, byte s * step of `count` rows).
struct Prefetch : PrefetchTile {
  const char* weights = nullptr;
  int64_t ld = 0, step = 0;  // bytes
  int64_t count = 0;

  template <class P, int MR>
  FASTVIT_INLINE_METHOD void at(int64_t s, int64_t steps, const typename P::Element* a,
                                int64_t lda) const {
    // A line holds twice kUnroll steps of a row: every other row now, the others next time.
    const typename P::Element* next = a + (P::kRows + (s / kUnroll & 1)) * lda;
    for (int i = 0; i < P::kRows; i += 2) __builtin_prefetch(next + i * lda, 0, 2);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(weights + i * ld + s * step, 0, 2);
    PrefetchTile::at<P, MR>(s, steps, a, lda);
  }
};

// Where all is near: asking whether there is anything to fetch takes 3 % of a product of 32 steps.
struct NoPrefetch {
  template <class P, int MR>
  FASTVIT_INLINE_METHOD void at(int64_t, int64_t, const typename P::Element*, int64_t) const {}
};

// What turns sums of quantised products into f32: a factor per row of A and one per column of B.
struct Scales {
  const float* rows = nullptr;
  const float* columns = nullptr;
};

// c[MR][NV * kLanes] (+)= a[MR][steps] * b[steps][NV * kLanes]. Sums of integers stay integers, in
// the same place, until `scales` are given.
template <class P, class Fetch, int MR, int NV>
static void micro_kernel(int64_t steps, const typename P::Element* a, int64_t lda,
                         const typename P::Element* b, float* c, int64_t ldc, bool accumulate,
                         const Scales& scales, const Fetch& prefetch) {
  using Accumulator = typename P::Accumulator;
  Accumulator acc[MR][NV] = {};
  if (accumulate) {
    const float* row = c;
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i, row += ldc) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = (Accumulator)load(row + j * kLanes);
    }
  }
  if constexpr (P::kHasSums) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const auto sums = (Accumulator)P::load_unit(b + j * kLanes * P::kPair);
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) acc[i][j] += sums;
    }
    b += NV * kLanes * P::kPair;
  }
  const auto step = [&]() __attribute__((always_inline)) {
    typename P::Unit line[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) line[j] = P::load_unit(b + j * kLanes * P::kPair);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const typename P::Unit x = P::broadcast(a + i * lda);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = P::mac(x, line[j], acc[i][j]);
    }
    a += P::kPair;
    b += NV * kLanes * P::kPair;
  };
  constexpr int kUnroll = Prefetch::kUnroll;
  int64_t s = 0;
  for (; s + kUnroll <= steps; s += kUnroll) {
    prefetch.template at<P, MR>(s, steps, a, lda);
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) step();
  }
  for (; s < steps; ++s) step();
  // Or the compiler works out all rows' addresses before the loop, and spills them.
  asm volatile("" : "+r"(c));
  if constexpr (P::kQuantized) {
    if (scales.rows != nullptr) {
      f32v column[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) column[j] = load(scales.columns + j * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i, c += ldc) {
        const f32v row = set1(scales.rows[i]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          store(c + j * kLanes, to_float(acc[i][j]) * (column[j] * row));
        }
      }
      return;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i, c += ldc) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + j * kLanes, (f32v)acc[i][j]);
  }
}

#if defined(FASTVIT_TILES)
// c[16 R][16 C] (+)= a[16 R][16 blocks] * b[16 blocks][16 C], in tiles. C takes tiles 0 to 3, A 4
// and 5, B 6 and 7. `visit` is called once per block.
template <class P, int R, int C, class Visit>
FASTVIT_INLINE void multiply_tiles(int64_t blocks, const typename P::Element* a, int64_t lda,
                                   const typename P::Element* b, int64_t ldb, float* c, int64_t ldc,
                                   bool accumulate, const Visit& visit) {
  constexpr int64_t kTileRows = 16, kDepth = P::kSteps * P::kPair;
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t b_bytes = ldb * static_cast<int64_t>(sizeof(typename P::Element));
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
    visit(block);
    amx::load_tile<4>(a, a_bytes);
    amx::load_tile<6>(b, b_bytes);
    P::template dot<0, 4, 6>();
    if constexpr (C == 2) {
      amx::load_tile<7>(b + kLanes * P::kPair, b_bytes);
      P::template dot<1, 4, 7>();
    }
    if constexpr (R == 2) {
      amx::load_tile<5>(a + kTileRows * lda, a_bytes);
      P::template dot<2, 5, 6>();
      if constexpr (C == 2) P::template dot<3, 5, 7>();
    }
    a += kDepth;
    b += P::kSteps * ldb;
  }
  amx::store_tile<0>(c, c_bytes);
  if constexpr (C == 2) amx::store_tile<1>(c + kLanes, c_bytes);
  if constexpr (R == 2) amx::store_tile<2>(below, c_bytes);
  if constexpr (R == 2 && C == 2) amx::store_tile<3>(below + kLanes, c_bytes);
}

// `micro_kernel` by tiles, for R x 16 rows of A and of c: there is room for those that don't exist.
//
// 2 x 2 tiles take four products, of 16 cycles each, for four loads, of 8: the loads hide. 1 x 4
// would take five, and read B, which comes from L2, once per 16 rows instead of 32. A panel of 64
// columns is two halves, the second of which finds A in L1.
template <class P, class Fetch, int R, int NV>
static void tile_kernel(int64_t steps, const typename P::Element* a, int64_t lda,
                        const typename P::Element* b, float* c, int64_t ldc, bool accumulate,
                        const Scales& scales, const Fetch& prefetch) {
  constexpr int64_t kRows = 16 * R, ldb = NV * kLanes * P::kPair;
  const int64_t blocks = ceil_div(steps, P::kSteps);
  const auto fetch = [&](int64_t block) __attribute__((always_inline)) {
    for (int64_t s = 0; s < P::kSteps; s += Prefetch::kUnroll) {
      prefetch.template at<P, kRows>(block * P::kSteps + s, blocks * P::kSteps,
                                     a + (block * P::kSteps + s) * P::kPair, lda);
    }
  };
  const auto nothing = [](int64_t) {};
  constexpr int kFirst = NV < 2 ? 1 : 2;
  multiply_tiles<P, R, kFirst>(blocks, a, lda, b, ldb, c, ldc, accumulate, fetch);
  if constexpr (NV > 2) {
    multiply_tiles<P, R, NV - 2>(blocks, a, lda, b + 2 * kLanes * P::kPair, ldb, c + 2 * kLanes,
                                 ldc, accumulate, nothing);
  }
  if constexpr (P::kQuantized) {
    if (scales.rows == nullptr) return;
    for (int64_t i = 0; i < kRows; ++i, c += ldc) {
      const f32v row = set1(scales.rows[i]);
      for (int j = 0; j < NV; ++j) {
        const auto sum = (i32v)load(c + j * kLanes);
        store(c + j * kLanes, to_float(sum) * (load(scales.columns + j * kLanes) * row));
      }
    }
  }
}
#endif

// The kernels of a product by rows and vectors, from one of each on.
template <class P, class Fetch = Prefetch>
struct MicroKernels {
  using Function = void (*)(int64_t steps, const typename P::Element* a, int64_t lda,
                            const typename P::Element* b, float* c, int64_t ldc, bool accumulate,
                            const Scales& scales, const Fetch& prefetch);

  template <int MR>
  struct Row {
    Function at[kVectors];
    constexpr Row() : at{} {
      at[0] = micro_kernel<P, Fetch, MR, 1>;
      at[1] = micro_kernel<P, Fetch, MR, 2>;
      if constexpr (kVectors == 4) {
        at[2] = micro_kernel<P, Fetch, MR, 3>;
        at[3] = micro_kernel<P, Fetch, MR, 4>;
      }
    }
  };

  FASTVIT_INLINE Function get(int64_t rows, int64_t vectors) {
#if defined(FASTVIT_TILES)
    if constexpr (P::kTiles) {
      static constexpr Function kTable[2][kVectors] = {
          {tile_kernel<P, Fetch, 1, 1>, tile_kernel<P, Fetch, 1, 2>, tile_kernel<P, Fetch, 1, 3>,
           tile_kernel<P, Fetch, 1, 4>},
          {tile_kernel<P, Fetch, 2, 1>, tile_kernel<P, Fetch, 2, 2>, tile_kernel<P, Fetch, 2, 3>,
           tile_kernel<P, Fetch, 2, 4>}};
      return kTable[rows > 16][vectors - 1];
    }
#endif
    if constexpr (!P::kTiles) {
      static constexpr Row<1> k1;
      static constexpr Row<2> k2;
      static constexpr Row<3> k3;
      static constexpr Row<4> k4;
      static constexpr Row<5> k5;
      static constexpr Row<6> k6;
      static constexpr const Function* kTable[P::kRows] = {k1.at, k2.at, k3.at,
                                                           k4.at, k5.at, k6.at};
      return kTable[rows - 1][vectors - 1];
    }
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
