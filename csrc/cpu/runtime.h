// What kernels ask of the process: scratch memory, cache sizes, a safe thread count.
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

// The number of threads to start for a request. A child of fork() has lost the OpenMP pool of its
// parent and would wait for it for ever, so it gets one thread if the parent had started a pool.
// Built without OpenMP, there is one thread.
int usable_threads(int requested);

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
