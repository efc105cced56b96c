// The product by vectors.
//
//   all threads: for each strip of one to four panels    of the last strips, for pieces of the rows
//     for each chunk of K                                sized so that the packed panels stay in L2
//       pack the panels' weights                         64 columns x kc each
//       for each group of 6 rows and panel
//         micro-kernel: 6 x 64 tile                      24 accumulators, B from L2, A from L1
//         after the last chunk: epilogue(tile)
//
// Why so: panels are stationary and A streams past them at 24 bytes a step, which even L3 delivers,
// so the same loop serves 1 and 100,000 rows.

#pragma once

#include "micro_kernel.h"
#include "packed_rows.h"
#include "runtime.h"
#include "tasks.h"
#include "weight.h"

namespace fastvit::cpu::FASTVIT_ISA {

// One thread's memory in a product.
template <class P>
struct ProductWorker {
  typename P::Element* panels;
  float* partial;  // results of the K chunks so far
  float* scales;   // of gated panels' columns
  int64_t bytes;   // of all of these
};

template <class P, class Source, class Epilogue>
static void vector_product(int64_t m, const Weight& w, int requested_threads, const Source& source,
                           const Epilogue& epilogue) {
  using Element = typename P::Element;
  constexpr int64_t kRows = P::kRows;
  const ThreadLease lease(requested_threads);
  const int threads = lease.threads;
  const CacheSizes& caches = cache_sizes();
  constexpr int64_t kUnit = kLanes * P::kPair;

  // K chunks: a packed panel, or four narrow ones, take 3/8 of L2; A, C and the weights being read
  // need the rest.
  constexpr int64_t kTogether = kPanel < 64 ? 4 : 1;
  constexpr int64_t kColumnBytes = kTogether * kPanel * static_cast<int64_t>(sizeof(Element));
  const int64_t most_k = max(caches.l2 * 3 / 8 / kColumnBytes, kUnit);
  const int64_t k_chunks = max(ceil_div(w.k, most_k), 1);
  const int64_t kc = round_up(ceil_div(w.k, k_chunks), kUnit);

  const int64_t block_rows = kIsPacked<Source> ? round_up(m, kRows) : packed_rows<P>(m, w.k);

  const int64_t panel_columns = w.panel_columns<P>();
  const int64_t panel_size = panel_elements<P>(kc);
  // A task takes two panels where both stay in L2: A then comes from L3 half as often.
  const int64_t panel_bytes = panel_size * static_cast<int64_t>(sizeof(Element));
  const bool two = k_chunks == 1 && 2 * panel_bytes <= caches.l2 / 2;
  const int64_t wide = max(kTogether, two ? 2 : 1);
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
    worker.partial = take.array<float>(partial_rows * kPanel * (k_chunks > 1 ? wide : 1));
    worker.scales = take.array<float>(P::kQuantized && w.gated ? wide * kPanel : 0);
    worker.bytes = take.used;
    return worker;
  };
  const int64_t worker_bytes = carve(nullptr).bytes;

  const RowsOfA<P, Source> a(source, m, w.k, block_rows);
  auto* workers = static_cast<char*>(scratch(Slot::kWorkers, worker_bytes * threads));

  const auto column = [&](int64_t task, int64_t i) {
    return (tasks.strip(task) * wide + i) * panel_columns;
  };

  const auto run_task = [&](int64_t block, int64_t block_size, int64_t task,
                            const ProductWorker<P>& worker) {
    Panel<P> panels[kTogether > 1 ? kTogether : 2];
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
          p.data = packed + p.col / panel_columns * panel_size;
          p.vectors = ceil_div(p.cols, kLanes);
        } else {
          Element* to = worker.panels + i * panel_size;
          p.data = to;
          p.vectors = pack_panel<P>(w, p.col, p.cols, k0, k, to);
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r = begin + g * kRows, mr = min(kRows, end - r);
        for (int64_t i = 0; i < count; ++i) {
          const Panel<P>& p = panels[i];
          float* tile = worker.partial + (k_chunks > 1 ? (g * wide + i) * kRows * kPanel : 0);
          // Tasks are handed out in order: a thread's next one is probably `threads` further on.
          Prefetch prefetch;
          if (packed == nullptr) {
            prefetch = next < w.k ? w.prefetch<P>(p.col, next, g, groups)
                                  : w.prefetch<P>(column(task + threads, i), 0, g, groups);
          }
          prefetch.rows = kTogether == 1 || i == 0;
          if (k_chunks == 1) {  // more tiles than one are too many for L1
            prefetch.tiles[2] = {reinterpret_cast<const char*>(tile), kPanel * sizeof(float),
                                 p.vectors * kLanes * static_cast<int64_t>(sizeof(float))};
          }
          Scales scales;
          if (next >= w.k) {
            epilogue.prefetch(block + r, p.col, prefetch.tiles);
            if constexpr (P::kQuantized) scales = {a.scales + r, p.scales};
          }
          MicroKernels<P>::get(mr, p.vectors)(ceil_div(k, P::kPair), a.rows + r * a.ld + k0, a.ld,
                                              p.data, tile, kPanel, k0 > 0, scales, prefetch);
          if (next >= w.k) epilogue(tile, block + r, mr, p.col, p.cols);
        }
      }
      k0 = next;
    } while (k0 < w.k);
  };

#pragma omp parallel num_threads(threads)
  {
    const ProductWorker<P> worker = carve(workers + FASTVIT_THREAD_INDEX * worker_bytes);
    for (int64_t block = 0; block < m; block += block_rows) {
      if (block > 0) {  // the region's end is barrier enough for the last block
#pragma omp barrier
      }
      const int64_t block_size = min(block_rows, m - block);
      a.fill(block, threads);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < tasks.count; ++task) {
        run_task(block, block_size, task, worker);
      }
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
