// The micro-kernel by vectors: a tile of at most P::kRows x kPanel sums, rows of A times a packed
// panel of B.

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
  static constexpr int kLead = 16 / kVectors;

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
  bool rows = true;  // false: another panel's kernel has fetched A

  template <class P, int MR>
  FASTVIT_INLINE_METHOD void at(int64_t s, int64_t steps, const typename P::Element* a,
                                int64_t lda) const {
    if (rows) {
      // A line holds twice kUnroll steps of a row: every other row now, the others next time.
      const typename P::Element* next = a + (P::kRows + (s / kUnroll & 1)) * lda;
      for (int i = 0; i < P::kRows; i += 2) __builtin_prefetch(next + i * lda, 0, 2);
    }
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
      for (int j = 0; j < NV; ++j) {
        acc[i][j] = P::mac(x, line[j], acc[i][j]);
        if constexpr (P::kHoldsSums) FASTVIT_TOUCH(acc[i][j]);
      }
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
    static constexpr Row<1> k1;
    static constexpr Row<2> k2;
    static constexpr Row<3> k3;
    static constexpr Row<4> k4;
    static constexpr Row<5> k5;
    static constexpr Row<6> k6;
    static constexpr const Function* kTable[P::kRows] = {k1.at, k2.at, k3.at, k4.at, k5.at, k6.at};
    return kTable[rows - 1][vectors - 1];
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
