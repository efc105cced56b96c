// What kernels ask of the process: scratch memory, cache sizes, threads.
// Implemented once, at the baseline instruction set (runtime.cpp).

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastvit::cpu {

// A grow-only, 64-byte aligned buffer of the calling thread, freed when that thread ends. Every
// slot is an independent buffer; asking again for the same slot invalidates what it held.
enum class Slot : int { kVectors, kRows, kWorkers, kHidden, kRow, kCount };
void* scratch(Slot slot, size_t bytes);

struct CacheSizes {
  int64_t l1d, l2, l3;  // bytes; l3 is shared by cores
};
const CacheSizes& cache_sizes();
// How many bytes one product may leave for the next, which should find them in L3. Less means more
// blocks of rows, and the weights packed once for each.
int64_t intermediate_bytes();

// The threads of one parallel region, this one included, held while the region may run.
//
// Regions in flight at once share one budget: each gets what its request leaves beside the threads
// that others hold, and at least its own. So n Python threads that each ask for n occupy about n
// cores, not n * n. A child of fork() starts with a fresh budget and no OpenMP pool. Built without
// OpenMP, there is one thread.
class ThreadLease {
 public:
  explicit ThreadLease(int requested);
  ~ThreadLease();
  ThreadLease(const ThreadLease&) = delete;
  ThreadLease& operator=(const ThreadLease&) = delete;

  const int threads;
};

struct LeasedThreads {
  int now, most;  // most: at any one time since it was last asked for
};
LeasedThreads leased_threads();

// The index of a thread inside a parallel region (a macro: see types.h on inline functions).
#ifdef _OPENMP
#define FASTVIT_THREAD_INDEX omp_get_thread_num()
#else
#define FASTVIT_THREAD_INDEX 0
#endif

// Random-looking signs, +-1, for the elements of a row of n, the same ones always (quantize.h). The
// pointer stays good.
const float* rotation_signs(int64_t n);

double seconds_now();

}  // namespace fastvit::cpu
