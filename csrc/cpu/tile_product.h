// The product by AMX tiles.
//
//   all threads: for each strip of panels       their packed weights stay in a share of L2
//     pack the panels' weights                  32 columns each
//     for each set of groups of 32 rows         their rows of A stay in a share of L2
//       for each panel and chunk of K           its weights stay in L1
//         for each group
//           tile kernel: 32 x 32 tile           B from L1, A from L2
//             meanwhile: epilogue(the tile before)
//
// Why so: a core multiplies 15 times as fast by tiles as by vectors, but L3 is no faster. Each
// byte of A that comes from L3 meets all columns of a strip, each byte of B from L2 all rows of a
// set; and an epilogue after the product, not beside it, would take as long again.
//
// Where K is large, strips and sets would be narrow. Then the chunks of K come first, for all of
// the above, and what all tiles have summed so far waits in L3.

#pragma once

#include "packed_rows.h"
#include "runtime.h"
#include "tasks.h"
#include "tile_kernel.h"
#include "weight.h"

namespace fastvit::cpu::FASTVIT_ISA {

template <class P, class Source, class Epilogue>
class TileProduct {
 public:
  TileProduct(int64_t m, const Weight& w, const Source& source, const Epilogue& epilogue)
      : m_(m),
        w_(w),
        epilogue_(epilogue),
        block_rows_(kIsPacked<Source> ? round_up(m, kRows) : packed_rows<P>(m, w.k)),
        a_(source, m, w.k, block_rows_) {}

  void run(int requested_threads) {
    const ThreadLease lease(requested_threads);
    const int threads = lease.threads;
    const CacheSizes& caches = cache_sizes();
    constexpr int64_t size = sizeof(Element);

    const int64_t most_k = caches.l1d * 2 / 3 / (P::kWidth * kLanes * size);
    chunks_ = max(ceil_div(w_.k, most_k), 1);
    chunk_ = max(round_up(ceil_div(w_.k, chunks_), kDepth), kDepth);
    chunks_ = max(ceil_div(w_.k, chunk_), 1);
    const int64_t set_bytes = caches.l2 / 4;
    chunks_first_ = set_bytes / (kRows * a_.ld * size) < kLeastGroups;
    groups_ = max(set_bytes / (kRows * (chunks_first_ ? chunk_ : a_.ld) * size), 1);

    panels_ = ceil_div(w_.n, w_.panel_columns<P>());
    panel_size_ = panel_elements<P>(chunks_first_ ? chunk_ : w_.k);
    const int64_t most_panels = max(caches.l2 * 3 / 8 / max(panel_size_ * size, 1), 1);
    const int64_t strips = min(round_up(ceil_div(panels_, most_panels), threads), panels_);
    wide_ = ceil_div(panels_, strips);

    tasks_ = Tasks::of<P>(min(block_rows_, m_), ceil_div(panels_, wide_), threads,
                          w_.packed ? 0 : P::kPackRows);
    const int64_t worker_bytes = carve(nullptr).bytes;
    auto* workers = static_cast<char*>(scratch(Slot::kWorkers, worker_bytes * threads));

#pragma omp parallel num_threads(threads)
    {
      const typename P::Registers registers{};
      const Worker worker = carve(workers + FASTVIT_THREAD_INDEX * worker_bytes);
      for (int64_t block = 0; block < m_; block += block_rows_) {
        if (block > 0) {  // the region's end is barrier enough for the last block
#pragma omp barrier
        }
        a_.fill(block, threads);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < tasks_.count; ++task) multiply(worker, block, task);
      }
    }
  }

 private:
  using Element = typename P::Element;

  static constexpr int64_t kRows = P::kRows, kDepth = P::kSteps * P::kPair;
  static constexpr int64_t kLeastGroups = 4;  // of a set that holds all k

  // One thread's memory.
  struct Worker {
    Element* panels;
    float* tiles;   // two side by side, as wide as kPanel
    float* scales;  // of gated panels' columns
    int64_t bytes;  // of all of these
  };

  Worker carve(char* base) const {
    Carver take{base};
    Worker w;
    w.panels = take.array<Element>(w_.packed ? 0 : wide_ * panel_size_);
    const int64_t rows = tasks_.whole ? tasks_.rows : tasks_.piece_rows;
    const int64_t tiles = chunks_first_ ? ceil_div(rows, kRows) * wide_ : chunks_ > 1 ? groups_ : 1;
    w.tiles = take.array<float>(ceil_div(tiles, 2) * kRows * kPanel);
    w.scales = take.array<float>(P::kQuantized && w_.gated ? wide_ * P::kWidth * kLanes : 0);
    w.bytes = take.used;
    return w;
  }

  // A tile of results, of which rows first .. rows have yet to go through the epilogue. In memory
  // there is room for all kRows.
  struct Tile {
    float* at = nullptr;
    int64_t row = 0, rows = 0, col = 0, cols = 0, vectors = 0;  // of the product
    const float* row_scales = nullptr;
    const float* column_scales = nullptr;
    int64_t first = 0;
  };

  // What is done while a tile is multiplied, a share of it at each visit.
  struct Meanwhile {
    const Epilogue& epilogue;
    Tile done;           // the tile before
    int64_t step;        // rows of a tile in a share
    Tiles touched = {};  // what the next visits will touch: into L1, for writing
    int64_t row = 0, touched_rows = 0;

    Meanwhile(const Epilogue& each, const Tile& before, int64_t visits)
        : epilogue(each), done(before), step(ceil_div(kRows, visits)) {}

    FASTVIT_INLINE_METHOD void operator()() {
      const int64_t to = min(row + step, touched_rows);
      for (; row < to; ++row) {
        for (const TileRows& tile : touched) {
          for (int64_t b = 0; b < tile.bytes; b += 64) {
            __builtin_prefetch(tile.rows + row * tile.ld + b, 1, 3);
          }
        }
      }
      if (done.first < done.rows) finish(epilogue, done, step);
    }
  };

  // The next `count` rows of a tile, through the epilogue.
  FASTVIT_INLINE void finish(const Epilogue& epilogue, Tile& tile, int64_t count) {
    const int64_t rows = min(count, tile.rows - tile.first);
    if (rows <= 0) return;
    float* at = tile.at + tile.first * kPanel;
    if constexpr (P::kQuantized) {
      for (int64_t i = 0; i < rows; ++i) {
        const f32v scale = set1(tile.row_scales[tile.first + i]);
        for (int64_t j = 0; j < tile.vectors * kLanes; j += kLanes) {
          const auto sum = (i32v)load(at + i * kPanel + j);
          store(at + i * kPanel + j, to_float(sum) * (load(tile.column_scales + j) * scale));
        }
      }
    }
    epilogue(at, tile.row + tile.first, rows, tile.col, tile.cols);
    tile.first += rows;
  }

  void multiply(const Worker& worker, int64_t block, int64_t task) const {
    const int64_t first = tasks_.strip(task) * wide_, last = min(first + wide_, panels_);
    const int64_t begin = tasks_.begin(task);
    const int64_t end = min(tasks_.end(task), min(block_rows_, m_ - block));
    if (begin >= end) return;

    Tile done;
    for (int64_t outer = 0; outer < (chunks_first_ ? chunks_ : 1); ++outer) {
      const int64_t last_chunk = chunks_first_ ? outer + 1 : chunks_;
      for (int64_t set = begin; set < end; set += groups_ * kRows) {
        const int64_t set_end = min(set + groups_ * kRows, end);
        for (int64_t p = first; p < last; ++p) {
          const Panel<P> panel = panel_of(worker, p, p - first, outer, set == begin);
          for (int64_t c = outer; c < last_chunk; ++c) {
            const Element* b = panel.data + (c - outer) * chunk_ * panel.vectors * kLanes;
            for (int64_t r = set; r < set_end; r += kRows) {
              Tile tile;
              tile.row = block + r, tile.rows = min(kRows, end - r);
              if constexpr (P::kQuantized) tile.row_scales = a_.scales + r;
              const float* next = nullptr;
              if (chunks_first_) {
                const int64_t slot = (r - begin) / kRows * wide_ + p - first;
                tile.at = slot_of(worker, slot);
                if (r + kRows < set_end) next = slot_of(worker, slot + wide_);
              } else {
                tile.at = slot_of(worker, chunks_ > 1 ? (r - set) / kRows : 0);
              }
              multiply_tile(a_.rows + r * a_.ld, panel, b, c, next, tile, done);
              done = c + 1 == chunks_ ? tile : Tile{};
            }
          }
        }
      }
    }
    finish(epilogue_, done, kRows);
  }

  // Panel p, the i-th of a strip, from chunk `chunk` on; packed now, or before.
  Panel<P> panel_of(const Worker& worker, int64_t p, int64_t i, int64_t chunk, bool pack) const {
    const int64_t columns = w_.panel_columns<P>(), k0 = chunk * chunk_;
    Panel<P> panel;
    panel.col = p * columns, panel.cols = min(columns, w_.n - panel.col);
    panel.vectors = ceil_div(panel.cols, kLanes) * (w_.gated ? 2 : 1);
    panel.scales =
        panel_scales<P>(w_, panel.col, panel.cols, worker.scales + i * P::kWidth * kLanes);
    if (w_.packed) {
      panel.data = static_cast<const Element*>(w_.packed) + p * panel_elements<P>(w_.k) +
                   k0 * panel.vectors * kLanes;
    } else {
      Element* to = worker.panels + i * panel_size_;
      const int64_t k = chunks_first_ ? min(chunk_, w_.k - k0) : w_.k;
      if (pack) pack_panel<P>(w_, panel.col, panel.cols, k0, k, to);
      panel.data = to;
    }
    return panel;
  }

  static float* slot_of(const Worker& worker, int64_t slot) {
    return worker.tiles + slot / 2 * kRows * kPanel + slot % 2 * kPanel / 2;
  }

  // Chunk `chunk` of a tile: A from `rows` on, times b. Meanwhile `done`, the tile before, is
  // finished, and the place of the `next` one is fetched.
  void multiply_tile(const Element* rows, const Panel<P>& panel, const Element* b, int64_t chunk,
                     const float* next, Tile& tile, const Tile& done) const {
    const int64_t k0 = chunk * chunk_, blocks = ceil_div(min(chunk_, w_.k - k0), kDepth);
    tile.col = panel.col, tile.cols = panel.cols, tile.vectors = panel.vectors;
    tile.column_scales = panel.scales;

    Meanwhile meanwhile(epilogue_, done, max(2 * blocks, 1));
    meanwhile.touched_rows = tile.rows;
    if (chunk + 1 == chunks_) epilogue_.prefetch(tile.row, tile.col, meanwhile.touched);
    if (next != nullptr) {
      meanwhile.touched[2] = {reinterpret_cast<const char*>(next), kPanel * sizeof(float),
                              P::kWidth * kLanes * sizeof(float)};
    }
    // The last visit sees the end of it, so the tile may be stored in the same place.
    if (blocks == 0) finish(epilogue_, meanwhile.done, kRows);
    tile_kernel_for<P, Meanwhile>(tile.rows, tile.vectors)(blocks, rows + k0, a_.ld, b, tile.at,
                                                           kPanel, chunk > 0, meanwhile);
  }

  const int64_t m_;
  const Weight& w_;
  const Epilogue& epilogue_;
  const int64_t block_rows_;
  const RowsOfA<P, Source> a_;
  Tasks tasks_{};
  int64_t panels_ = 0, panel_size_ = 0, wide_ = 0;  // of all columns; elements; of a strip
  int64_t chunks_ = 0, chunk_ = 0;                  // of K, and the elements of one
  int64_t groups_ = 0;                              // of a set
  bool chunks_first_ = false;
};

}  // namespace fastvit::cpu::FASTVIT_ISA
