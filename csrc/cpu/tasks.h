// How a product's work is split among threads.

#pragma once

#include "products.h"

namespace fastvit::cpu::FASTVIT_ISA {

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

}  // namespace fastvit::cpu::FASTVIT_ISA
