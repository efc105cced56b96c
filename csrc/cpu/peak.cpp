// fastvit: per-isa
//
// peak: the arithmetic rate of this instruction set, from registers alone. It is the yardstick
// beside which a kernel's speed is reported, so it must be measured in the same run.

#include "product.h"

namespace fastvit::cpu::FASTVIT_ISA {
namespace {

// As many independent chains as the micro-kernel has accumulators.
template <class P>
__attribute__((noinline)) float multiply_accumulate(int64_t steps,
                                                    const typename P::Element* data) {
  constexpr int kChains = kRows * kVectors;
  const typename P::Unit a = P::load_unit(data), b = P::load_unit(data + 1);
  f32v acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));  // equal ones would merge
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24
    for (f32v& each : acc) each = P::mac(a, b, each);
  }
  f32v sum = zero();
  for (const f32v& each : acc) sum += each;
  asm volatile("" ::: "memory");  // or the compiler calls this pure function once
  return reduce_add(sum);
}

template <class P>
double run(int requested_threads, double seconds) {
  constexpr double kFlopsPerStep = 2.0 * kRows * kVectors * kLanes * P::kPair;
  constexpr int64_t kSteps = 1 << 18;
  constexpr int kSlices = 5;  // the best of several: other processes can only slow a core down
  const ThreadLease lease(requested_threads);
  const int threads = lease.threads;
  double best = 0;
  for (int slice = 0; slice < kSlices; ++slice) {
    double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
      typename P::Element data[2 * kLanes * P::kPair] = {};
      volatile float sink;
      int64_t steps = 0;
      const double begin = seconds_now();
      double elapsed;
      do {
        sink = multiply_accumulate<P>(kSteps, data);
        steps += kSteps;
        elapsed = seconds_now() - begin;
      } while (elapsed < seconds / kSlices);
      (void)sink;
      rate = static_cast<double>(steps) * kFlopsPerStep / elapsed / 1e9;
    }
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace

double peak(Compute compute, int num_threads, double seconds) {
  return compute == Compute::kBF16 ? run<ProductBF16>(num_threads, seconds)
                                   : run<ProductF32>(num_threads, seconds);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
