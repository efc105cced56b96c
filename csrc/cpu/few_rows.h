// A product of few rows: a classifier's head, and the last block's class tokens, of some images.
//
//   all threads: source fills the rows of A
//   all threads: for each panel of columns
//     for each span of columns and group of rows   up to 24 sums at once; lanes hold consecutive k
//     epilogue(tile)                               of a row of A, and of a row of the weight
//
// The weight is read where it lies, once, in the order in which it lies. Packing it would cost as
// much as kPackRows rows; a row costs half as much again as where it is packed, because each sum
// must be added up across its lanes, and A and B share the bandwidth of L1.

#pragma once

#include "packed_rows.h"
#include "runtime.h"
#include "weight.h"

namespace fastvit::cpu::FASTVIT_ISA {

// A product of bytes by tiles has no instruction for vectors.
template <class P>
constexpr bool kHasFewRows = !(P::kQuantized && P::kTiles);

template <class P>
class FewRows {
 public:
  // Up to how many rows it is the faster product (measured on Zen 5, weights in L3 and in memory:
  // 2 to 5 times as fast with one row, 1.1 to 1.5 times with 16, even from 24 to 32 on).
  static constexpr int64_t kMost = 16;

  template <class Source, class Epilogue>
  static void product(int64_t m, const Weight& w, int requested_threads, const Source& source,
                      const Epilogue& epilogue) {
    const ThreadLease lease(requested_threads);
    const int threads = lease.threads;
    const int64_t k = round_up(w.k, kBlock), lda = packed_ld<P>(k);
    const auto carve = [&](char* base) {
      Carver take{base};
      Memory memory;
      memory.rows = take.array<Element>(m * lda);
      memory.row_scales = take.array<float>(P::kQuantized ? m : 0);
      memory.tiles = take.array<float>(threads * m * kPanel);
      memory.scales = take.array<float>(P::kQuantized && w.gated ? threads * kPanel : 0);
      memory.bytes = take.used;
      return memory;
    };
    const Memory memory = carve(static_cast<char*>(scratch(Slot::kRows, carve(nullptr).bytes)));
    const int64_t panel_columns = w.panel_columns<P>();

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t r = 0; r < m; ++r) {
        Element* row = memory.rows + r * lda;
        if constexpr (kIsPacked<Source>) {
          __builtin_memcpy(row, source.rows + r * source.ld, w.k * sizeof(Element));
        } else if constexpr (P::kQuantized) {
          memory.row_scales[r] = source(r, row);
        } else {
          source(r, row);
        }
        for (int64_t i = w.k; i < k; ++i) row[i] = Element{};
      }
      float* tile = memory.tiles + FASTVIT_THREAD_INDEX * m * kPanel;
      float* room = memory.scales + FASTVIT_THREAD_INDEX * kPanel;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < ceil_div(w.n, panel_columns); ++task) {
        const int64_t col = task * panel_columns, cols = min(panel_columns, w.n - col);
        if constexpr (P::kQuantized) {
          panel<int8_t>(m, w, col, cols, memory.rows, lda, tile);
          scale(m, w, col, cols, memory.row_scales, room, tile);
        } else if (w.dtype == DType::kF32) {
          panel<float>(m, w, col, cols, memory.rows, lda, tile);
        } else {
          panel<bf16>(m, w, col, cols, memory.rows, lda, tile);
        }
        for (int64_t r = 0; r < m; r += kRows) {
          epilogue(tile + r * kPanel, r, min(kRows, m - r), col, cols);
        }
      }
    }
  }

 private:
  using Element = typename P::Element;
  using Accumulator = typename P::Accumulator;
  using Unit = typename P::Unit;

  static constexpr int64_t kBlock = kLanes * P::kPair;  // elements of a vector
  static constexpr int kRows = 6;                       // at once
  // Columns at which a group of rows takes its turn, while their weights stay in L1.
  static constexpr int kSpan = kPanel < 16 ? kPanel : 16;

  struct Memory {
    Element* rows;
    float* row_scales;
    float* tiles;   // a thread's: (m, kPanel)
    float* scales;  // a thread's, of a gated panel's columns
    int64_t bytes;  // of all of these
  };

  // How many columns at once: as many sums as the micro-kernel has, the weights' own included.
  static constexpr int columns(int rows) {
    int n = kSpan;
    while (n > 1 && n * (rows + P::kHasSums) > kRows * kVectors) n /= 2;
    return n;
  }

  FASTVIT_INLINE Accumulator mac(Unit a, Unit b, Accumulator c) {
#if defined(__aarch64__)
    return P::mac_lanes(a, b, c);  // `mac` takes a from its first lane
#else
    return P::mac(a, b, c);
#endif
  }

  // c[MR][kSpan], rows kPanel apart, = a[MR][k] * b[kSpan][k].
  template <int MR, class T>
  static void span(int64_t k, const Element* a, int64_t lda, const T* const* b, float* c) {
    constexpr int NC = columns(MR);
    for (int j = 0; j < kSpan; j += NC) sums<MR, NC>(k, a, lda, b + j, c + j);
  }

  template <int MR, int NC, class T>
  FASTVIT_INLINE void sums(int64_t k, const Element* a, int64_t lda, const T* const* b, float* c) {
    Accumulator acc[MR][NC] = {};
    [[maybe_unused]] Accumulator weights[NC] = {};
    const auto step = [&](int64_t k0, int64_t left) __attribute__((always_inline)) {
      Unit x[MR];
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) {
        x[i] = (Unit)load(reinterpret_cast<const float*>(a + i * lda + k0));
      }
#pragma GCC unroll 16
      for (int j = 0; j < NC; ++j) {
        const auto y = (Unit)P::load_steps(b[j] + k0, left);
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) acc[i][j] = mac(x[i], y, acc[i][j]);
        if constexpr (P::kHasSums) weights[j] = mac(P::ones(), y, weights[j]);
      }
    };
    int64_t k0 = 0;
    for (; k0 + kBlock <= k; k0 += kBlock) step(k0, kBlock);
    if (k0 < k) step(k0, k - k0);

    // Across lanes, kLanes sums at a time.
    constexpr int kGroups = (MR * NC + kLanes - 1) / kLanes;
    float totals[kGroups * kLanes];
    for (int g = 0; g < kGroups; ++g) {
      f32v lanes[kLanes];
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) {
        const int at = g * kLanes + t, i = at / NC, j = at % NC;
        if (i >= MR) {
          lanes[t] = zero();
        } else if constexpr (P::kHasSums) {
          lanes[t] = (f32v)(acc[i][j] + weights[j] * -P::kShift);
        } else {
          lanes[t] = (f32v)acc[i][j];
        }
      }
      transpose(lanes);
      auto total = (Accumulator)lanes[0];
#pragma GCC unroll 16
      for (int t = 1; t < kLanes; ++t) total += (Accumulator)lanes[t];
      store(totals + g * kLanes, (f32v)total);
    }
    for (int i = 0; i < MR; ++i) {
      __builtin_memcpy(c + i * kPanel, totals + i * NC, NC * sizeof(float));
    }
  }

  // The tile of a panel: the sums of m rows, as a micro-kernel leaves them.
  template <class T>
  static void panel(int64_t m, const Weight& w, int64_t col, int64_t cols, const Element* a,
                    int64_t lda, float* tile) {
    static constexpr decltype(&span<1, T>) kBy[kRows] = {span<1, T>, span<2, T>, span<3, T>,
                                                         span<4, T>, span<5, T>, span<6, T>};
    const int64_t half = round_up(cols, kLanes), width = w.gated ? 2 * half : half;
    const int64_t group = ceil_div(m, ceil_div(m, kRows));
    for (int64_t j = 0; j < width; j += kSpan) {
      const T* b[kSpan];
      for (int64_t i = 0; i < kSpan; ++i) {
        const bool value = w.gated && j + i >= half;
        // Columns that don't exist are the last one again; nobody reads them.
        const int64_t row = col + min(j + i - (value ? half : 0), cols - 1) + (value ? w.n : 0);
        b[i] = static_cast<const T*>(w.data) + row * w.ld;
      }
      for (int64_t r = 0; r < m; r += group) {
        kBy[min(group, m - r) - 1](w.k, a + r * lda, lda, b, tile + r * kPanel + j);
      }
    }
  }

  // Sums of integers to floats.
  static void scale(int64_t m, const Weight& w, int64_t col, int64_t cols, const float* row_scales,
                    float* room, float* tile) {
    const float* columns = panel_scales<P>(w, col, cols, room);
    const int64_t width = round_up(cols, kLanes) * (w.gated ? 2 : 1);
    for (int64_t r = 0; r < m; ++r, tile += kPanel) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const auto sum = (i32v)load(tile + j);
        store(tile + j, to_float(sum) * (load(columns + j) * set1(row_scales[r])));
      }
    }
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
