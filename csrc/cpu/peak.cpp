// fastvit: per-isa
//
// peak: the arithmetic rate of this instruction set, from registers alone. It is the yardstick
// beside which a kernel's speed is reported, so it must be measured in the same run.

#include "product.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

// As many independent chains as the micro-kernel has accumulators.
[[maybe_unused]] f32v as_f32(f32v v) { return v; }
[[maybe_unused]] f32v as_f32(i32v v) { return to_float(v); }

template <class P>
__attribute__((noinline)) float multiply_accumulate(int64_t steps,
                                                    const typename P::Element* data) {
  constexpr int kChains = P::kRows * kVectors;
  typename P::Unit a = P::load_unit(data);
  const typename P::Unit b = P::load_unit(data + 1);
  typename P::Accumulator acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) {
    acc[i] = (typename P::Accumulator)set1(static_cast<float>(i));  // equal ones would merge
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24
    for (auto& each : acc) {
      FASTVIT_TOUCH(a);  // or a product that never changes is made once, and only added
      each = P::mac(a, b, each);
    }
  }
  f32v sum = zero();
  for (const auto& each : acc) sum += as_f32(each);
  asm volatile("" ::: "memory");  // or the compiler calls this pure function once
  return reduce_add(sum);
}

#if defined(FASTVIT_TILES)
// The same by tiles: a step is four products of zeros, which take as long as any.
template <class P>
__attribute__((noinline)) void multiply_accumulate_tiles(int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    P::template dot<0, 4, 6>();
    P::template dot<1, 4, 7>();
    P::template dot<2, 5, 6>();
    P::template dot<3, 5, 7>();
  }
}
#endif

template <class P>
void work(int64_t steps) {
#if defined(FASTVIT_TILES)
  if constexpr (P::kTiles) return multiply_accumulate_tiles<P>(steps);
#endif
  if constexpr (!P::kTiles) {
    typename P::Element data[2 * kLanes * P::kPair] = {};
    [[maybe_unused]] volatile float sink = multiply_accumulate<P>(steps, data);
  }
}

template <class P>
double run(int requested_threads, double seconds) {
  // By tiles, 32 x 32 results of 16 steps.
  constexpr double kFlopsPerStep =
      2.0 * P::kRows * P::kPair * (P::kTiles ? 32 * P::kSteps : kVectors * kLanes);
  constexpr int64_t kSteps = 1 << 18;
  constexpr int kSlices = 5;  // the best of several: other processes can only slow a core down
  const ThreadLease lease(requested_threads);
  const int threads = lease.threads;
  double best = 0;
  for (int slice = 0; slice < kSlices; ++slice) {
    double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
      [[maybe_unused]] const typename P::Registers registers{};
      int64_t steps = 0;
      const double begin = seconds_now();
      double elapsed;
      do {
        work<P>(kSteps);
        steps += kSteps;
        elapsed = seconds_now() - begin;
      } while (elapsed < seconds / kSlices);
      rate = static_cast<double>(steps) * kFlopsPerStep / elapsed / 1e9;
    }
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace

double peak(Compute compute, int num_threads, double seconds) {
  switch (compute) {
    case Compute::kF32:
      return run<ProductF32>(num_threads, seconds);
    case Compute::kBF16:
      return run<ProductBF16>(num_threads, seconds);
    case Compute::kI8:
      return run<ProductI8>(num_threads, seconds);
  }
  return 0.0;
}

}  // namespace fastvit::cpu::FASTVIT_ISA
