// fastvit: per-isa
//
// rotate: x = x cos + partner(x) sin for the last tokens of x, in place (rotary positions, RoPE)
//
// The partner of a channel lies head_dim / 2 away, or beside it, and half of the partners change
// sign: the sines' signs are turned once per token, for all heads. It reads and writes q and k
// where the projection has just put them, so its limit is the bandwidth of L2 or L3.

#include "rows.h"
#include "runtime.h"
#include "simd.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

// One head of one token, whose channels have their partners half a head away.
void turn_halves(const Rows& x, int64_t at, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t n = half - d;
    const f32v first = x.load_at(at + d, n), second = x.load_at(at + half + d, n);
    x.store_at(at + d, fmadd(first, load(cos + d), second * load(sin + d)), n);
    x.store_at(at + half + d, fmadd(second, load(cos + half + d), first * load(sin + half + d)), n);
  }
}

// The same with partners side by side.
void turn_pairs(const Rows& x, int64_t at, const float* cos, const float* sin, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const f32v v = x.load_at(at + d, head_dim - d);
    x.store_at(at + d, fmadd(v, load(cos + d), swap_pairs(v) * load(sin + d)), head_dim - d);
  }
}

}  // namespace

void rotate(const RotateArgs& args) {
  const int64_t samples = args.x.size[0], heads = args.x.size[2], head_dim = args.x.size[3];
  const int64_t positions = args.cos.size[0], prefix = args.x.size[1] - positions;
  const Rows x(args.x, 0), cos_table(args.cos, 0), sin_table(args.sin, 0);
  // The last vector of the second half may begin at the last channel.
  const int64_t length = round_up(head_dim, kLanes) + kLanes;
  const ThreadLease lease(args.num_threads);
#pragma omp parallel for num_threads(lease.threads) schedule(static)
  for (int64_t task = 0; task < samples * positions; ++task) {
    const int64_t sample = task / positions, position = task % positions;
    auto* cos =
        static_cast<float*>(scratch(Slot::kRow, 2 * length * static_cast<int64_t>(sizeof(float))));
    float* sin = cos + length;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int64_t n = head_dim - d;
      store(cos + d, cos_table.load_at(position * args.cos.stride[0] + d, n));
      store(sin + d, sin_table.load_at(position * args.sin.stride[0] + d, n));
    }
    const int64_t step = args.interleaved ? 2 : 1, end = args.interleaved ? head_dim : head_dim / 2;
    for (int64_t d = 0; d < end; d += step) sin[d] = -sin[d];
    int64_t at = sample * args.x.stride[0] + (prefix + position) * args.x.stride[1];
    for (int64_t head = 0; head < heads; ++head, at += args.x.stride[2]) {
      args.interleaved ? turn_pairs(x, at, cos, sin, head_dim)
                       : turn_halves(x, at, cos, sin, head_dim);
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
