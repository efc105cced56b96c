// out = epilogue(source @ weight^T): the one matrix product of fastvit.
//
//   for each block of rows of A                        (bounded scratch, usually one block)
//     all threads: source fills the packed rows of A   LayerNorm, im2col, quantisation or a copy
//                                                      happens here, unless they can be read where
//                                                      they lie
//     all threads: for each strip of one or two panels (of the last strips, for pieces of the rows)
//       for each chunk of K                            sized so that the packed panels stay in L2
//         pack the panels' weights                     64 columns x kc each
//         for each group of 6 rows and panel           32, where the product is one by AMX tiles
//           micro-kernel: 6 x 64 tile                  24 accumulators, B from L2, A from L1
//           after the last chunk: epilogue(tile)       bias, activation, residual, store
//
// A product of few rows has a shorter way (few_rows.h).
//
// Why so: panels are stationary and A streams past them at 24 bytes a step, which even L3 delivers,
// so the same loop serves 1 and 100,000 rows. Weights are packed inside the call: it costs as much
// as kPackRows rows, needs a panel or two of memory per thread, and can never be stale. An int8
// weight may come packed: whoever quantised it watches over it (pack_weight.cpp).

#pragma once

#include "few_rows.h"
#include "runtime.h"
#include "weight.h"

namespace fastvit::cpu::FASTVIT_ISA {

// ---- Work splitting -----------------------------------------------------------------------------

// Into how many chunks to split `rows` so that `tasks` x chunks keep all threads busy, where a
// chunk costs `pack_rows` rows on top. The last to finish costs a fraction of a chunk more: cores
// are never equally fast.
template <class P>
static int64_t split_rows(int64_t rows, int64_t tasks, int threads,
                          double pack_rows = P::kPackRows) {
  if (threads == 1) return 1;
  int64_t best = 1;
  double best_cost = 0;
  for (int64_t chunks = 1; chunks <= ceil_div(rows, 4 * P::kRows) && chunks <= 64; ++chunks) {
    const double chunk = static_cast<double>(ceil_div(rows, chunks)) + pack_rows;
    const double cost = (static_cast<double>(ceil_div(tasks * chunks, threads)) + 0.25) * chunk;
    if (chunks == 1 || cost < best_cost) best = chunks, best_cost = cost;
  }
  return best;
}

// The tasks of a product: a strip of columns and all rows; and of the last strips, one for each
// thread, pieces of the rows, so that all threads finish together.
struct Tasks {
  int64_t rows, whole, pieces, piece_rows, count;

  template <class P>
  static Tasks of(int64_t rows, int64_t strips, int threads, double pack_rows) {
    const int64_t last = min(strips, threads);
    const int64_t most = split_rows<P>(rows, last, threads, pack_rows);
    const int64_t piece_rows = round_up(ceil_div(rows, most), P::kRows);
    const int64_t pieces = ceil_div(rows, piece_rows);
    return {rows, strips - last, pieces, piece_rows, strips - last + last * pieces};
  }

  int64_t strip(int64_t task) const {
    return task < whole ? task : whole + (task - whole) / pieces;
  }
  int64_t begin(int64_t task) const {
    return task < whole ? 0 : (task - whole) % pieces * piece_rows;
  }
  int64_t end(int64_t task) const {
    return task < whole ? rows : min(begin(task) + piece_rows, rows);
  }
};

// How many of m packed rows of A to hold at a time: equal blocks within a share of L3.
template <class P>
static int64_t packed_rows(int64_t m, int64_t k) {
  const int64_t bytes = intermediate_bytes();
  const int64_t row = packed_ld<P>(k) * static_cast<int64_t>(sizeof(typename P::Element));
  const int64_t most = max(bytes / row, 8 * P::kRows);
  return round_up(ceil_div(m, ceil_div(m, most)), P::kRows);
}

// One thread's memory in a product.
template <class P>
struct ProductWorker {
  typename P::Element* panels;
  float* partial;  // results of the K chunks so far
  float* scales;   // of gated panels' columns
  int64_t bytes;   // of all of these
};

// ---- Driver -------------------------------------------------------------------------------------

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
  using Element = typename P::Element;
  constexpr int64_t kRows = P::kRows;
  if (m == 0 || w.n == 0) return;
  if constexpr (kHasFewRows<P>) {
    if (m <= FewRows<P>::kMost) {
      return FewRows<P>::product(m, w, requested_threads, source, epilogue);
    }
  }
  const ThreadLease lease(requested_threads);
  const int threads = lease.threads;
  const CacheSizes& caches = cache_sizes();
  constexpr int64_t kUnit = kLanes * P::kPair;

  // K chunks: a packed panel takes 3/8 of L2; A, C and the weights being read need the rest.
  const int64_t most_k =
      max(caches.l2 * 3 / 8 / (kPanel * static_cast<int64_t>(sizeof(Element))), kUnit);
  const int64_t k_chunks = max(ceil_div(w.k, most_k), 1);
  const int64_t kc = round_up(ceil_div(w.k, k_chunks), kUnit);

  int64_t lda = packed_ld<P>(w.k);
  if constexpr (kIsPacked<Source>) lda = source.ld;
  const int64_t block_rows = kIsPacked<Source> ? round_up(m, kRows) : packed_rows<P>(m, w.k);

  const int64_t panel_columns = w.panel_columns();
  const int64_t panel_size = panel_elements<P>(kc);
  // A task takes two panels where both stay in L2: A then comes from L3 half as often.
  const int64_t panel_bytes = panel_size * static_cast<int64_t>(sizeof(Element));
  const int64_t wide = k_chunks == 1 && 2 * panel_bytes <= caches.l2 / 2 ? 2 : 1;
  const int64_t strips = ceil_div(w.n, wide * panel_columns);
  // Panels that lie ready are of all k.
  const auto* packed = k_chunks == 1 ? static_cast<const Element*>(w.packed) : nullptr;
  const Tasks tasks =
      Tasks::of<P>(min(block_rows, m), strips, threads, packed == nullptr ? P::kPackRows : 0);

  const int64_t partial_rows =
      k_chunks > 1 ? round_up(tasks.whole ? tasks.rows : tasks.piece_rows, kRows) : kRows;
  const auto carve = [&](char* base) {
    Carver take{base};
    ProductWorker<P> worker;
    worker.panels = take.array<Element>(packed == nullptr ? wide * panel_size : 0);
    worker.partial = take.array<float>(partial_rows * kPanel);
    worker.scales = take.array<float>(P::kQuantized && w.gated ? wide * kPanel : 0);
    worker.bytes = take.used;
    return worker;
  };
  const int64_t worker_bytes = carve(nullptr).bytes;

  // A row is dear where the source pools tokens: then few rows must still keep all threads busy.
  const int64_t fill_rows = max(min(min(block_rows, m) / (8 * threads), 4 * kRows), 1);

  const Element* rows;
  [[maybe_unused]] Element* filled = nullptr;
  float* row_scales = nullptr;
  if constexpr (kIsPacked<Source>) {
    rows = source.rows;
  } else {
    const int64_t bytes = block_rows * lda * static_cast<int64_t>(sizeof(Element));
    const int64_t scale_bytes = P::kQuantized ? block_rows * sizeof(float) : 0;
    auto* memory = static_cast<char*>(scratch(Slot::kRows, bytes + scale_bytes));
    rows = filled = reinterpret_cast<Element*>(memory);
    row_scales = reinterpret_cast<float*>(memory + bytes);
  }
  auto* workers = static_cast<char*>(scratch(Slot::kWorkers, worker_bytes * threads));

  const auto column = [&](int64_t task, int64_t i) {
    return (tasks.strip(task) * wide + i) * panel_columns;
  };

  const auto run_task = [&](int64_t block, int64_t block_size, int64_t task,
                            const ProductWorker<P>& worker) {
    Panel<P> panels[2];
    int64_t count = 0;
    for (; count < wide; ++count) {
      const int64_t col = column(task, count);
      if (col >= w.n) break;
      const int64_t cols = min(panel_columns, w.n - col);
      float* room = worker.scales + count * kPanel;
      panels[count] = {nullptr, panel_scales<P>(w, col, cols, room), col, cols, 0};
    }
    const int64_t begin = tasks.begin(task), end = min(tasks.end(task), block_size);
    if (begin >= end) return;
    const int64_t groups = ceil_div(end - begin, kRows);
    int64_t k0 = 0;
    do {  // once even for K == 0: the epilogue still has a bias to store
      const int64_t k = min(kc, w.k - k0), next = k0 + kc;
      for (int64_t i = 0; i < count; ++i) {
        Panel<P>& p = panels[i];
        if (packed != nullptr) {
          p.data = packed + p.col / kPanel * panel_size;
          p.vectors = ceil_div(p.cols, kLanes);
        } else {
          Element* to = worker.panels + i * panel_size;
          p.data = to;
          p.vectors = pack_panel<P>(w, p.col, p.cols, k0, k, to);
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r = begin + g * kRows, mr = min(kRows, end - r);
        float* tile = worker.partial + (k_chunks > 1 ? g * kRows * kPanel : 0);
        for (int64_t i = 0; i < count; ++i) {
          const Panel<P>& p = panels[i];
          // Tasks are handed out in order: a thread's next one is probably `threads` further on.
          Prefetch prefetch;
          if (packed == nullptr) {
            prefetch = next < w.k ? w.prefetch<P>(p.col, next, g, groups)
                                  : w.prefetch<P>(column(task + threads, i), 0, g, groups);
          }
          if (k_chunks == 1) {  // more tiles than one are too many for L1
            prefetch.tiles[2] = {reinterpret_cast<const char*>(tile), kPanel * sizeof(float),
                                 p.vectors * kLanes * static_cast<int64_t>(sizeof(float))};
          }
          Scales scales;
          if (next >= w.k) {
            epilogue.prefetch(block + r, p.col, prefetch.tiles);
            if constexpr (P::kQuantized) scales = {row_scales + r, p.scales};
          }
          MicroKernels<P>::get(mr, p.vectors)(ceil_div(k, P::kPair), rows + r * lda + k0, lda,
                                              p.data, tile, kPanel, k0 > 0, scales, prefetch);
          if (next >= w.k) epilogue(tile, block + r, mr, p.col, p.cols);
        }
      }
      k0 = next;
    } while (k0 < w.k);
  };

#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename P::Registers registers{};
    const ProductWorker<P> worker = carve(workers + FASTVIT_THREAD_INDEX * worker_bytes);
    for (int64_t block = 0; block < m; block += block_rows) {
      if (block > 0) {  // the region's end is barrier enough for the last block
#pragma omp barrier
      }
      const int64_t block_size = min(block_rows, m - block);
      if constexpr (!kIsPacked<Source>) {
#pragma omp for schedule(dynamic, fill_rows)
        for (int64_t r = 0; r < block_size; ++r) {
          Element* row = filled + r * lda;
          prefetch_row<P>(row + lda, lda);
          if constexpr (P::kQuantized) {
            row_scales[r] = source(block + r, row);
          } else {
            source(block + r, row);
          }
          pad_row<P>(row, w.k);
        }
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < tasks.count; ++task) {
        run_task(block, block_size, task, worker);
      }
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
