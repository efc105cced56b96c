// fastvit: per-isa
//
// attention: out = softmax(scale * q k^T + bias) v, per sample and head
//
// A task is a block of query rows of one head. K is packed as panels with keys in the lanes, V with
// head_dim in the lanes, so both products are the one micro-kernel, and any head_dim and
// any number of tokens only change the last panel:
//
//   for each chunk of keys                  one chunk for most ViTs; sized for L2
//     pack K and V of the chunk
//     for each group of query rows          6 by vectors, 32 by AMX tiles
//       for each span of the chunk          all of it by vectors; sized for L1 by tiles
//         scores (rows x span) = q k^T      q where it lies, if it has the dtype of the product
//         softmax in f32, online            running maximum and sum per row
//         output (rows x head_dim) = rescaled output + p v
//       after the last chunk: output / sum
//
// The N x N matrix never exists: the widest thing is a group's rows of one span. Probabilities are
// used unnormalised, in [0, 1], so rounding them to bf16 costs one relative rounding; the division
// by their f32 sum comes last. A row whose scores are all -inf gives zeros.

#include "attention_bias.h"
#include "product.h"
#include "vmath.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
// Beyond it the product with the scale rounds by 2^-10 and more, or overflows (a mask of -FLT_MAX
// is no -infinity): then the maximum is taken off first.
constexpr float kExactShift = 1 << 14;

// Columns, keys or head_dim, as panels. Those of four vectors are of nearly equal width: 80 becomes
// 48 + 32, not 64 + 16, because a narrow panel has too few accumulators to hide the latency of a
// multiply-add.
template <class P>
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t columns)
      : vectors(ceil_div(columns, kLanes)), count(ceil_div(vectors, P::kWidth)) {}

  int64_t first(int64_t panel) const {
    return P::kWidth <= 2 ? min(panel * P::kWidth, vectors) : panel * vectors / count;
  }
  int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
};

template <class P>
struct Worker {
  using Element = typename P::Element;

  Element* q;      // (block or kRows, ldq), where q can't be read in place
  Element* k;      // panels of (head_dim / pair, panel width)
  Element* v;      // panels of (chunk / pair, panel width)
  float* scores;   // (kRows, lds), and the probabilities that overwrite them
  float* out;      // (held, head_dim in whole vectors)
  float* row_max;  // (held)
  float* row_sum;  // (held)
  float* keep;     // (held): factors of what out holds, since the maximum has grown
  int64_t bytes;   // of all of these
};

// Some query rows of one head.
template <class P>
struct Group {
  int64_t query, rows;  // the first one, and how many
  int64_t held;         // where their sums are
  int64_t to;           // where in args.out they will go
  const typename P::Element* q;
  int64_t ldq;
};

// Some keys of a head: `count` of them from `first` on, which are packed from `packed` on.
struct Keys {
  int64_t first, count, packed;
};

template <class P>
class Attention {
 public:
  using Element = typename P::Element;
  static constexpr int64_t kDepth = P::kPair * P::kSteps;  // what a product takes at once

  explicit Attention(const AttentionArgs& args)
      : args_(args),
        batch_(args.q.size[0]),
        queries_(args.q.size[1]),
        heads_(args.q.size[2]),
        head_dim_(args.q.size[3]),
        keys_(args.k.size[1]),
        panels_(head_dim_),
        in_place_(args.q.dtype == kDTypeOf<P> && head_dim_ % kDepth == 0),
        scale_(args.scale * kLog2e) {}

  void run() {
    if (batch_ * heads_ * queries_ == 0) return;
    const ThreadLease lease(args_.num_threads);
    const int threads = lease.threads;

    // Packed K and V are read for each group of rows: all keys may take three quarters of L2. In
    // chunks, whose sums take a quarter (below), they may take a half.
    const int64_t per_key = 2 * panels_.vectors * kLanes * static_cast<int64_t>(sizeof(Element));
    const int64_t l2 = cache_sizes().l2;
    const int64_t most = max(keys_ * per_key <= l2 * 3 / 4 ? keys_ : l2 / 2 / per_key, kPanel);
    const int64_t chunks = max(ceil_div(keys_, P::kTiles ? most : min(most, 1024)), 1);
    chunk_ = round_up(ceil_div(keys_, chunks), kPanel);
    // A tile of scores that misses L1 takes longer to store than to multiply.
    const int64_t most_span = cache_sizes().l1d * 5 / 6 / (P::kRows * sizeof(float));
    const int64_t keys = min(chunk_, keys_);
    span_ =
        P::kTiles ? round_up(ceil_div(keys, max(ceil_div(keys, most_span), 1)), kDepth) : chunk_;

    ldo_ = panels_.vectors * kLanes;
    const int64_t most_rows = chunks > 1 ? max(l2 / 4 / (4 * ldo_), P::kRows) : queries_;
    const int64_t splits =
        max(split_rows<P>(queries_, batch_ * heads_, threads), ceil_div(queries_, most_rows));
    block_ = round_up(ceil_div(queries_, splits), P::kRows);
    held_ = chunks > 1 ? block_ : P::kRows;
    const int64_t blocks = ceil_div(queries_, block_);

    ldq_ = row_bytes(padded(head_dim_) * sizeof(Element)) / sizeof(Element);
    lds_ = row_bytes(span_ * sizeof(float)) / sizeof(float);
    ldp_ = lds_ * static_cast<int64_t>(sizeof(float) / sizeof(Element));
    const int64_t worker_bytes = carve(nullptr).bytes;
    auto* base = static_cast<char*>(scratch(Slot::kWorkers, worker_bytes * threads));

#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] const typename P::Registers registers{};
      const Worker<P> worker = carve(base + FASTVIT_THREAD_INDEX * worker_bytes);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < batch_ * heads_ * blocks; ++task) {
        const int64_t head = task / blocks, begin = task % blocks * block_;
        // Tasks are handed out in order, so this thread's next head is probably this one.
        const int64_t next = min((task + threads) / blocks, batch_ * heads_ - 1);
        attend(worker, head / heads_, head % heads_, begin, min(begin + block_, queries_), next);
      }
    }
  }

 private:
  Worker<P> carve(char* base) const {
    Carver take{base};
    Worker<P> w;
    w.q = take.array<Element>((!in_place_ ? block_ : P::kTiles ? P::kRows : 0) * ldq_);
    w.k = take.array<Element>(padded(head_dim_) * chunk_);
    w.v = take.array<Element>(chunk_ * ldo_);
    w.scores = take.array<float>(P::kRows * lds_);
    w.out = take.array<float>(held_ * ldo_);
    w.row_max = take.array<float>(held_);
    w.row_sum = take.array<float>(held_);
    w.keep = take.array<float>(held_);
    w.bytes = take.used;
    return w;
  }

  // Keys, or elements of a head, and the zeros behind them that a product reads.
  static int64_t padded(int64_t count) { return round_up(count, kDepth); }

  static int64_t at(const View& view, int64_t sample, int64_t token, int64_t head) {
    return sample * view.stride[0] + token * view.stride[1] + head * view.stride[2];
  }

  // Tokens first .. last of a head that will be needed soon. The rows of one head lie far apart:
  // each is a cache miss, which no hardware prefetcher foresees. Inlined, because GCC takes a
  // function that only prefetches for one without effect, and drops the call.
  FASTVIT_INLINE_METHOD void prefetch(const View& view, int64_t head, int64_t first,
                                      int64_t last) const {
    const int64_t size = view.dtype == DType::kF32 ? 4 : 2;
    for (int64_t i = first; i < last; ++i) {
      const char* row =
          static_cast<const char*>(view.data) + at(view, head / heads_, i, head % heads_) * size;
      for (int64_t b = 0; b < head_dim_ * size; b += 64) __builtin_prefetch(row + b, 0, 2);
    }
  }

  void attend(const Worker<P>& w, int64_t sample, int64_t head, int64_t begin, int64_t end,
              int64_t next) const {
    if (!in_place_) copy_queries(w, sample, head, begin, end);
    const Bias bias(args_.bias, sample, head);
    if (keys_ == 0) {
      for (int64_t i = 0; i < P::kRows * ldo_; ++i) w.out[i] = 0.0f;
      for (int64_t i = 0; i < P::kRows; ++i) w.row_sum[i] = 0.0f;
      for (int64_t r = begin; r < end; r += P::kRows) {
        Group<P> group{};
        group.rows = min(P::kRows, end - r), group.to = at(args_.out, sample, r, head);
        finish(w, group);
      }
    }
    for (int64_t k0 = 0; k0 < keys_; k0 += chunk_) {
      const int64_t keys = min(chunk_, keys_ - k0);
      pack(w, sample, head, k0, keys);
      for (int64_t r = begin; r < end; r += P::kRows) {
        const int64_t key = k0 + r - begin;
        prefetch(args_.q, next, r, min(r + P::kRows, queries_));
        prefetch(args_.k, next, key, min(key + P::kRows, keys_));
        prefetch(args_.v, next, key, min(key + P::kRows, keys_));
        const Group<P> group = group_of(w, sample, head, begin, r, end);
        for (int64_t s = 0; s < keys; s += span_) {
          const Keys span{k0 + s, min(span_, keys - s), s};
          score(w, group, span);
          softmax(w, bias, group, span);
          weigh(w, group, span);
        }
        if (k0 + keys == keys_) finish(w, group);
      }
    }
  }

  Group<P> group_of(const Worker<P>& w, int64_t sample, int64_t head, int64_t begin, int64_t r,
                    int64_t end) const {
    Group<P> group;
    group.query = r, group.rows = min(P::kRows, end - r);
    group.held = held_ == block_ ? r - begin : 0;
    group.to = at(args_.out, sample, r, head);
    group.q = w.q, group.ldq = ldq_;
    if (!in_place_) {
      group.q += (r - begin) * ldq_;
    } else if (P::kTiles && group.rows % 16 != 0) {  // a tile reads rows that don't exist
      copy_queries(w, sample, head, r, end);
    } else {
      group.q = static_cast<const Element*>(args_.q.data) + at(args_.q, sample, r, head);
      group.ldq = args_.q.stride[1];
    }
    return group;
  }

  void copy_queries(const Worker<P>& w, int64_t sample, int64_t head, int64_t begin,
                    int64_t end) const {
    const Rows q(args_.q, 0);
    for (int64_t i = begin; i < end; ++i) {
      Element* row = w.q + (i - begin) * ldq_;
      const int64_t offset = at(args_.q, sample, i, head);
      int64_t d = 0;
      for (; d < head_dim_; d += kLanes) {  // a short vector loads zeros
        store(row + d, q.load_at(offset + d, head_dim_ - d));
      }
      for (; d < padded(head_dim_); d += kLanes) store(row + d, zero());
    }
  }

  // K and V of a chunk, kLanes keys of both at a time: each token's row lies in a page of its own,
  // which holds its v as well.
  void pack(const Worker<P>& w, int64_t sample, int64_t head, int64_t k0, int64_t keys) const {
    const Panels<P> panels(keys);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t key = panels.first(i) * kLanes, vectors = panels.width(i);
      Element* panel = w.k + key * padded(head_dim_);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = key + v * kLanes, left = keys - first;
        pack_columns<P>(args_.k.data, args_.k.dtype, at(args_.k, sample, k0 + first, head),
                        args_.k.stride[1], left, head_dim_, panel + v * kLanes * P::kPair,
                        vectors * kLanes * P::kPair);
        const int64_t from = at(args_.v, sample, k0 + first, head);
        if (args_.v.dtype == DType::kF32) {
          pack_values(w, static_cast<const float*>(args_.v.data) + from, first, left);
        } else {
          pack_values(w, static_cast<const bf16*>(args_.v.data) + from, first, left);
        }
      }
    }
  }

  // At most kLanes of the `left` rows of values, which are the chunk's from `first` on.
  template <class T>
  void pack_values(const Worker<P>& w, const T* rows, int64_t first, int64_t left) const {
    const int64_t ld = args_.v.stride[1];
    const int64_t keys = min(left, kLanes);
    const int64_t end = left > kLanes ? keys : padded(first + keys) - first;
    for (int64_t i = 0; i < panels_.count; ++i) {
      const int64_t begin = panels_.first(i) * kLanes, columns = panels_.width(i) * kLanes;
      Element* to = value_panel(w, i) + first * columns;
      for (int64_t key = 0; key < end; key += P::kPair) {
        const bool exists = key < keys;
        const T* row = (exists ? rows + key * ld : rows) + begin;
        const T* next = key + 1 < keys ? row + ld : nullptr;
        for (int64_t d = 0; d < columns; d += kLanes, to += kLanes * P::kPair) {
          const f32v units =
              P::load_pairs(row + d, next ? next + d : nullptr, exists ? head_dim_ - begin - d : 0);
          store(reinterpret_cast<float*>(to), units);
        }
      }
    }
  }

  Element* value_panel(const Worker<P>& w, int64_t i) const {
    return w.v + panels_.first(i) * kLanes * chunk_;
  }

  void score(const Worker<P>& w, const Group<P>& group, const Keys& span) const {
    const Panels<P> panels(span.count);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t key = panels.first(i) * kLanes;
      const Element* panel = w.k + (span.packed + key) * padded(head_dim_);
      float* to = w.scores + key;
#if defined(FASTVIT_TILES)
      if constexpr (P::kTiles) {
        tile_kernel_for<P>(group.rows, panels.width(i))(padded(head_dim_) / kDepth, group.q,
                                                        group.ldq, panel, to, lds_, false);
      }
#endif
      if constexpr (!P::kTiles) {
        MicroKernels<P, NoPrefetch>::get(group.rows, panels.width(i))(
            ceil_div(head_dim_, P::kPair), group.q, group.ldq, panel, to, lds_, false, {}, {});
      }
    }
  }

  // Scores of a group of rows to unnormalised probabilities, in powers of two:
  // 2^(log2(e) (s - max)). First the maxima of all rows, then the powers, so that the rows' chains
  // of dependent instructions overlap. Probabilities overwrite the scores.
  void softmax(const Worker<P>& w, const Bias& bias, const Group<P>& group,
               const Keys& span) const {
    const float scale = add_bias(w, bias, group, span);
    float most[P::kRows];
    for (int64_t i = 0; i < group.rows; ++i) most[i] = highest(w.scores + i * lds_, span.count);
    for (int64_t i = 0; i < group.rows; ++i) {
      float* s = w.scores + i * lds_;
      const int64_t held = group.held + i;
      const float before = span.first > 0 ? w.row_max[held] : -kInfinity;
      if (before > most[i]) most[i] = before;
      float shift = -most[i] * scale;
      if (!(shift < kExactShift && shift > -kExactShift)) {
        if (most[i] != -kInfinity) subtract(s, most[i], span.count);
        shift = 0.0f;
      }
      float total = powers(s, set1(scale), set1(shift), span.count);
      if (span.first > 0) {
        // Asked first, because both are -infinity where no key counts yet.
        const bool same = before == most[i];
        w.keep[held] = first_lane(exp2(set1(same ? 0.0f : (before - most[i]) * scale)));
        total += w.row_sum[held] * w.keep[held];
      }
      w.row_max[held] = most[i];
      w.row_sum[held] = total;
    }
  }

  // Returns the positive factor that the scores still lack, in powers of two.
  float add_bias(const Worker<P>& w, const Bias& bias, const Group<P>& group,
                 const Keys& span) const {
    if (!bias.view && scale_ >= 0.0f) return scale_;
    for (int64_t i = 0; i < group.rows; ++i) {
      float* s = w.scores + i * lds_;
      if (bias.view) {
        bias.apply(s, group.query + i, span.first, span.count, args_.scale);
      } else {
        for (int64_t j = 0; j < span.count; j += kLanes) store(s + j, zero() - load(s + j));
      }
    }
    return bias.view ? kLog2e : -scale_;
  }

  static float highest(const float* s, int64_t keys) {
    const int64_t whole = keys / kLanes * kLanes, left = keys - whole;
    f32v best[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= whole; j += 4 * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) best[c] = at_least(load(s + j + c * kLanes), best[c]);
    }
    for (; j < whole; j += kLanes) best[0] = at_least(load(s + j), best[0]);
    if (left > 0) best[1] = at_least(keep_first(load(s + j), left, best[1]), best[1]);
    return reduce_max(at_least(at_least(best[0], best[1]), at_least(best[2], best[3])));
  }

  static void subtract(float* s, float highest, int64_t keys) {
    for (int64_t j = 0; j < keys; j += kLanes) store(s + j, load(s + j) - set1(highest));
  }

  // p = 2^(s scale + shift) for a row of scores, which p overwrites; returns the sum.
  static float powers(float* s, f32v scale, f32v shift, int64_t keys) {
    const int64_t whole = keys / kLanes * kLanes, left = keys - whole;
    auto* p = reinterpret_cast<Element*>(s);
    const auto power = [&](int64_t j) __attribute__((always_inline)) {
      const f32v x = fmadd(load(s + j), scale, shift);
      if constexpr (P::kPair == 1) {
        return exp2(x);
      } else {
        return exp2_bf16(x);
      }
    };
    f32v sum[2] = {zero(), zero()};
    int64_t j = 0;
    for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
      const f32v first = power(j), second = power(j + kLanes);
      sum[0] += first, sum[1] += second;
      store_two(p + j, first, second);
    }
    if (j < whole) {
      const f32v v = power(j);
      sum[0] += v;
      store(p + j, v);
    }
    if (left > 0) {
      const f32v v = keep_first(power(whole), left);
      sum[1] += v;
      store(p + whole, v);
    }
    if constexpr (P::kTiles) {
      for (j = round_up(keys, kLanes); j < padded(keys); j += kLanes) store(p + j, zero());
    }
    return reduce_add(sum[0] + sum[1]);
  }

  void weigh(const Worker<P>& w, const Group<P>& group, const Keys& span) const {
    const bool accumulate = span.first > 0;
    float* held = w.out + group.held * ldo_;
    for (int64_t i = 0; accumulate && i < group.rows; ++i) {
      const f32v keep = set1(w.keep[group.held + i]);
      float* out = held + i * ldo_;
      for (int64_t d = 0; d < ldo_; d += kLanes) store(out + d, load(out + d) * keep);
    }
    const auto* p = reinterpret_cast<const Element*>(w.scores);
    const Rows result(args_.out, args_.out.stride[1]), out(held, DType::kF32, ldo_);
    for (int64_t i = 0; i < panels_.count; ++i) {
      const int64_t d = panels_.first(i) * kLanes;
      const Element* values = value_panel(w, i) + span.packed * panels_.width(i) * kLanes;
#if defined(FASTVIT_TILES)
      if constexpr (P::kTiles) {
        tile_kernel_for<P>(group.rows, panels_.width(i))(padded(span.count) / kDepth, p, ldp_,
                                                         values, held + d, ldo_, accumulate);
      }
#endif
      if constexpr (!P::kTiles) {
        PrefetchTile prefetch;
        prefetch.tiles[0] = out.tile(d, panels_.width(i) * kLanes);
        prefetch.tiles[1] = result.tile(group.to + d, panels_.width(i) * kLanes);
        MicroKernels<P, PrefetchTile>::get(group.rows, panels_.width(i))(
            ceil_div(span.count, P::kPair), p, ldp_, values, held + d, ldo_, accumulate, {},
            prefetch);
      }
    }
  }

  // The held rows of a group, to args_.out.
  void finish(const Worker<P>& w, const Group<P>& group) const {
    const Rows out(args_.out, 0);
    int64_t to = group.to;
    for (int64_t i = group.held; i < group.held + group.rows; ++i, to += args_.out.stride[1]) {
      const float sum = w.row_sum[i];
      const f32v inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
      const float* values = w.out + i * ldo_;
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        out.store_at(to + d, load(values + d) * inverse, head_dim_ - d);
      }
    }
  }

  const AttentionArgs& args_;
  const int64_t batch_, queries_, heads_, head_dim_, keys_;
  const Panels<P> panels_;
  const bool in_place_;  // is q read where it lies?
  const float scale_;    // of scores without bias, in powers of two
  // Keys and queries at a time, and queries whose sums are held: while there are more keys, all.
  int64_t chunk_ = 0, block_ = 0, held_ = 0;
  int64_t span_ = 0;  // keys whose scores are held at a time
  int64_t ldq_ = 0, lds_ = 0, ldp_ = 0, ldo_ = 0;
};

}  // namespace

void attention(const AttentionArgs& args) {
  args.compute == Compute::kBF16 ? Attention<ProductBF16>(args).run()
                                 : Attention<ProductF32>(args).run();
}

}  // namespace fastvit::cpu::FASTVIT_ISA
