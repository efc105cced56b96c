// A of a product: rows as the kernels read them, and the memory in which a product keeps them.

#pragma once

#include "products.h"
#include "runtime.h"

namespace fastvit::cpu::FASTVIT_ISA {

// A row stride in bytes that is an odd number of cache lines: six rows never share a cache set.
FASTVIT_INLINE int64_t row_bytes(int64_t bytes) {
  const int64_t lines = ceil_div(bytes, 64);
  return (lines | 1) * 64;
}

// Whether rows `bytes` apart drive each other out of L1, when a micro-kernel reads kRows of them
// side by side and B besides: their lines are in one set, which has a way for each page of the
// cache. A wide panel leaves time to fetch them again (Zen 4, of 8 ways: 89 % of the peak; Zen 3 by
// AVX2: 69 %).
template <class P>
static bool rows_collide(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  return kPanel < 64 && bytes % kPage == 0 && cache_sizes().l1d / kPage < 2 * P::kRows;
}

// The elements from one packed row of A, of k elements, to the next.
template <class P>
static int64_t packed_ld(int64_t k) {
  constexpr int64_t size = sizeof(typename P::Element);
  return row_bytes(k * size) / size;
}

// How many of m packed rows of A to hold at a time: equal blocks within a share of L3.
template <class P>
static int64_t packed_rows(int64_t m, int64_t k) {
  const int64_t bytes = intermediate_bytes();
  const int64_t row = packed_ld<P>(k) * static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t most = max(bytes / row, 8 * P::kRows);
  return round_up(ceil_div(m, ceil_div(m, most)), P::kRows);
}

// For writing. Other cores have read the row since it was last written, and stores, which retire in
// order, would wait for each of its lines.
template <class P>
FASTVIT_INLINE void prefetch_row(const typename P::Element* row, int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(typename P::Element);
  for (int64_t i = 0; i < elements; i += kLine) __builtin_prefetch(row + i, 1);
}

// Zeros behind the k elements of a packed row, as far as the micro-kernel reads.
template <class P>
FASTVIT_INLINE void pad_row(typename P::Element* row, int64_t k) {
  for (; k % (P::kPair * P::kSteps) != 0; ++k) row[k] = typename P::Element{};
}

// A source of rows that can be read where they lie, `ld` elements apart: of the product's dtype,
// and padded as by `pad_row`. A product by tiles needs room for whole kRows behind the last.
template <class P>
struct PackedRows {
  const typename P::Element* rows;
  int64_t ld;
};

template <class Source>
constexpr bool kIsPacked = false;
template <class P>
constexpr bool kIsPacked<PackedRows<P>> = true;

// A of a product, a block of its rows at a time: packed rows as they are, or what a source makes.
template <class P, class Source>
class RowsOfA {
 public:
  using Element = typename P::Element;

  // m rows of k elements, `block` at a time.
  RowsOfA(const Source& source, int64_t m, int64_t k, int64_t block)
      : source_(source), m_(m), k_(k), block_(block) {
    if constexpr (kIsPacked<Source>) {
      rows = source.rows;
      ld = source.ld;
    } else {
      ld = packed_ld<P>(k);
      const int64_t bytes = block * ld * static_cast<int64_t>(sizeof(Element));
      const int64_t scale_bytes = P::kQuantized ? block * sizeof(float) : 0;
      auto* memory = static_cast<char*>(scratch(Slot::kRows, bytes + scale_bytes));
      rows = filled_ = reinterpret_cast<Element*>(memory);
      scales = reinterpret_cast<float*>(memory + bytes);
    }
  }

  // Makes the rows of the block that begins at row `first`: all threads of a parallel region.
  void fill(int64_t first, int threads) const {
    if constexpr (!kIsPacked<Source>) {
      const int64_t count = min(block_, m_ - first);
      // A row is dear where the source pools tokens: then few rows must still keep all busy.
      const int64_t share = max(min(count / (8 * threads), 4 * P::kRows), 1);
#pragma omp for schedule(dynamic, share)
      for (int64_t r = 0; r < count; ++r) {
        Element* row = filled_ + r * ld;
        prefetch_row<P>(row + ld, ld);
        if constexpr (P::kQuantized) {
          scales[r] = source_(first + r, row);
        } else {
          source_(first + r, row);
        }
        pad_row<P>(row, k_);
      }
    }
  }

  const Element* rows = nullptr;
  int64_t ld = 0;
  float* scales = nullptr;  // of quantised rows

 private:
  const Source& source_;
  const int64_t m_, k_, block_;
  Element* filled_ = nullptr;
};

// Lays arrays out in one block of memory; from a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* array(int64_t n) {
    T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return out;
  }
};

}  // namespace fastvit::cpu::FASTVIT_ISA
