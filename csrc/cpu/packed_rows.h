// A of a product: rows as the kernels read them, and the memory in which a product keeps them.

#pragma once

#include "products.h"

namespace fastvit::cpu::FASTVIT_ISA {

// A row stride in bytes that is an odd number of cache lines: six rows never share a cache set.
FASTVIT_INLINE int64_t row_bytes(int64_t bytes) {
  const int64_t lines = ceil_div(bytes, 64);
  return (lines | 1) * 64;
}

// The elements from one packed row of A, of k elements, to the next.
template <class P>
static int64_t packed_ld(int64_t k) {
  constexpr int64_t size = sizeof(typename P::Element);
  return row_bytes(k * size) / size;
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
