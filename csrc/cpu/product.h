// out = epilogue(source @ weight^T): the one matrix product, and the one micro-kernel, of fastvit.
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
// Why so: panels are stationary and A streams past them at 24 bytes a step, which even L3 delivers,
// so the same loop serves 1 and 100,000 rows. Weights are packed inside the call: it costs as much
// as kPackRows rows, needs a panel or two of memory per thread, and can never be stale.

#pragma once

#include "pack.h"
#include "rows.h"
#include "runtime.h"
#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {

// ---- Micro-kernel -------------------------------------------------------------------------------

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

// ---- Work splitting -----------------------------------------------------------------------------

// Into how many chunks to split `rows` so that `tasks` x chunks keep all threads busy, where a
// chunk costs `P::kPackRows` rows on top. The last to finish costs a fraction of a chunk more:
// cores are never equally fast.
template <class P>
static int64_t split_rows(int64_t rows, int64_t tasks, int threads) {
  if (threads == 1) return 1;
  int64_t best = 1;
  double best_cost = 0;
  for (int64_t chunks = 1; chunks <= ceil_div(rows, 4 * P::kRows) && chunks <= 64; ++chunks) {
    const double chunk = static_cast<double>(ceil_div(rows, chunks)) + P::kPackRows;
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
  static Tasks of(int64_t rows, int64_t strips, int threads) {
    const int64_t last = min(strips, threads);
    const int64_t most = split_rows<P>(rows, last, threads);
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

// How many of m packed rows of A to hold at a time: equal blocks within a share of L3.
template <class P>
static int64_t packed_rows(int64_t m, int64_t k) {
  const int64_t bytes = max(min(cache_sizes().l3 / 2, int64_t{16} << 20), int64_t{2} << 20);
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

// Columns col .. col + cols of the weight, packed.
template <class P>
struct Panel {
  typename P::Element* data;
  const float* scales;
  int64_t col, cols, vectors;
};

// One thread's memory in a product.
template <class P>
struct ProductWorker {
  typename P::Element* panels;
  float* partial;  // results of the K chunks so far
  float* scales;   // of gated panels' columns
  int64_t bytes;   // of all of these
};

// ---- Driver -------------------------------------------------------------------------------------

FASTVIT_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1;
}

// Of the elements of a product of floats.
template <class P>
constexpr DType kDTypeOf = P::kPair == 1 ? DType::kF32 : DType::kBF16;

struct Weight {
  const void* data;  // (n, k), or (2 n, k) when gated
  DType dtype;
  int64_t ld;
  int64_t n, k;
  bool gated;  // rows n.. are the values of a gated unit: panels hold gates, then their values
  const float* scale = nullptr;  // of an int8 weight's rows, padded to whole vectors

  int64_t panel_columns() const { return gated ? kPanel / 2 : kPanel; }

  // Share `part` of `parts` of the rows behind the panel at column col, from k0 on.
  template <class P>
  Prefetch prefetch(int64_t col, int64_t k0, int64_t part, int64_t parts) const {
    if (col >= n) return {};
    const int64_t cols = min(panel_columns(), n - col), size = bytes_of(dtype);
    const int64_t share = ceil_div(gated ? 2 * cols : cols, parts);
    int64_t first = part * share, end = cols;
    if (gated && first >= cols) first += n - cols, end = n + cols;
    const char* at = static_cast<const char*>(data) + ((col + first) * ld + k0) * size;
    return {{}, at, ld * size, P::kPair * size, max(min(share, end - first), 0)};
  }
};

// Columns col .. col + cols of the weight, k0 .. k0 + k. Returns the panel's width in vectors.
template <class P>
static int64_t pack_panel(const Weight& w, int64_t col, int64_t cols, int64_t k0, int64_t k,
                          typename P::Element* panel) {
  const int64_t half = ceil_div(cols, kLanes);
  const int64_t vectors = w.gated ? 2 * half : half;
  const int64_t line = vectors * kLanes * P::kPair;
  typename P::Element* lines = panel + (P::kHasSums ? line : 0);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t first = (v % half) * kLanes, at = v * kLanes * P::kPair;
    const int64_t row = col + first + (v >= half ? w.n : 0);
    const auto sums =
        pack_columns<P>(w.data, w.dtype, row * w.ld + k0, w.ld, cols - first, k, lines + at, line);
    if constexpr (P::kHasSums) {
      store(reinterpret_cast<float*>(panel + at), (f32v)(sums * -P::kShift));
    }
  }
  return vectors;
}

// The scales of a panel's columns, as the micro-kernel reads them.
template <class P>
static const float* panel_scales(const Weight& w, int64_t col, int64_t cols, float* room) {
  if constexpr (!P::kQuantized) return nullptr;
  if (!w.gated) return w.scale + col;
  const int64_t half = round_up(cols, kLanes);
  for (int64_t j = 0; j < half; j += kLanes) {
    store(room + j, load(w.scale + col + j));
    store(room + half + j, load(w.scale + w.n + col + j));
  }
  return room;
}

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
  const int64_t panel_elements = (kc / P::kPair + P::kHasSums) * kPanel * P::kPair;
  // A task takes two panels where both stay in L2: A then comes from L3 half as often.
  const int64_t panel_bytes = panel_elements * static_cast<int64_t>(sizeof(Element));
  const int64_t wide = k_chunks == 1 && 2 * panel_bytes <= caches.l2 / 2 ? 2 : 1;
  const int64_t strips = ceil_div(w.n, wide * panel_columns);
  const Tasks tasks = Tasks::of<P>(min(block_rows, m), strips, threads);

  const int64_t partial_rows =
      k_chunks > 1 ? round_up(tasks.whole ? tasks.rows : tasks.piece_rows, kRows) : kRows;
  const auto carve = [&](char* base) {
    Carver take{base};
    ProductWorker<P> worker;
    worker.panels = take.array<Element>(wide * panel_elements);
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
      panels[count] = {worker.panels + count * panel_elements, panel_scales<P>(w, col, cols, room),
                       col, cols, 0};
    }
    const int64_t begin = tasks.begin(task), end = min(tasks.end(task), block_size);
    if (begin >= end) return;
    const int64_t groups = ceil_div(end - begin, kRows);
    int64_t k0 = 0;
    do {  // once even for K == 0: the epilogue still has a bias to store
      const int64_t k = min(kc, w.k - k0), next = k0 + kc;
      for (int64_t i = 0; i < count; ++i) {
        Panel<P>& p = panels[i];
        p.vectors = pack_panel<P>(w, p.col, p.cols, k0, k, p.data);
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r = begin + g * kRows, mr = min(kRows, end - r);
        float* tile = worker.partial + (k_chunks > 1 ? g * kRows * kPanel : 0);
        for (int64_t i = 0; i < count; ++i) {
          const Panel<P>& p = panels[i];
          // Tasks are handed out in order: a thread's next one is probably `threads` further on.
          Prefetch prefetch = next < w.k ? w.prefetch<P>(p.col, next, g, groups)
                                         : w.prefetch<P>(column(task + threads, i), 0, g, groups);
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
