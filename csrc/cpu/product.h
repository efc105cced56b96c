// out = epilogue(source @ weight^T): the one matrix product of fastvit.
//
//   for each block of rows of A                        bounded scratch, usually one block
//     all threads: source fills the packed rows of A   LayerNorm, im2col, quantisation or a copy
//                                                      happens here, unless they can be read where
//                                                      they lie
//     all threads: products of strips of panels        vector_product.h; tile_product.h for AMX
//       epilogue(tile)                                 bias, activation, residual, store
//
// A product of few rows has a shorter way (few_rows.h).
//
// Weights are packed inside the call: it costs as much as kPackRows rows, needs some panels of
// memory per thread, and can never be stale. An int8 weight may come packed: whoever quantised it
// watches over it (pack_weight.cpp).

#pragma once

#include "few_rows.h"
#include "vector_product.h"
#if defined(FASTVIT_TILES)
#include "tile_product.h"
#endif

namespace fastvit::cpu::FASTVIT_ISA {

// Of the elements of a product of floats.
template <class P>
constexpr DType kDTypeOf = P::kPair == 1 ? DType::kF32 : DType::kBF16;

// source(row, out): writes the k elements of a row of A; of a quantised one, returns the scale. Or
// PackedRows, then m is one block.
// epilogue(tile, row, rows, col, cols): takes rows x cols results; a tile's rows are kPanel apart.
// epilogue.prefetch(row, col, tiles): names what it will read and write for a tile.
template <class P, class Source, class Epilogue>
static void product(int64_t m, const Weight& w, int requested_threads, const Source& source,
                    const Epilogue& epilogue) {
  if (m == 0 || w.n == 0) return;
  if constexpr (kHasFewRows<P>) {
    if (m <= FewRows<P>::kMost) {
      return FewRows<P>::product(m, w, requested_threads, source, epilogue);
    }
  }
#if defined(FASTVIT_TILES)
  if constexpr (P::kTiles) {
    return TileProduct<P, Source, Epilogue>(m, w, source, epilogue).run(requested_threads);
  }
#endif
  if constexpr (!P::kTiles) vector_product<P>(m, w, requested_threads, source, epilogue);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
