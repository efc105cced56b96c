// As much of CUDA as csrc/cuda uses, on the host: blocks run one after the other, the threads of a
// block as fibers that change places at barriers and shuffles. Slow and exact: it proves indices,
// masks, reductions and arithmetic where there is no GPU.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;  // few blocks, so that every thread walks over many rows
  return cudaSuccess;
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
  int warp_barriers = 0, block_barriers = 0;
  float shuffled = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current = 0;

inline void enter() {
  body();
  fibers[current].done = true;
}

// Waits until the other threads from first to last have come as far, or have ended.
inline void barrier(int Fiber::* count, unsigned first, unsigned last) {
  const int mine = ++(fibers[current].*count);
  for (int turns = 0;; ++turns) {
    bool all = true;
    for (unsigned i = first; i < last; ++i) all &= fibers[i].done || fibers[i].*count >= mine;
    if (all) return;
    if (turns > 1000) {
      std::fprintf(stderr, "a barrier is not reached by every thread\n");
      std::abort();
    }
    swapcontext(&fibers[current].context, &scheduler);
  }
}

inline void warp_barrier() {
  const unsigned first = current / 32 * 32;
  barrier(&Fiber::warp_barriers, first, first + 32);
}

inline void run_block() {
  fibers.assign(blockDim.x, Fiber());
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (current = 0; current < fibers.size(); ++current) {
      if (fibers[current].done) continue;
      any = true;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
}

}  // namespace on_host

inline void __syncthreads() { on_host::barrier(&on_host::Fiber::block_barriers, 0, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  on_host::fibers[on_host::current].shuffled = value;
  on_host::warp_barrier();
  const float other = on_host::fibers[on_host::current ^ static_cast<unsigned>(mask)].shuffled;
  on_host::warp_barrier();
  return other;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  struct CUstream_st* stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  on_host::body = [&] { kernel(arguments...); };
  ::blockDim = config->blockDim;
  ::gridDim = config->gridDim;
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      on_host::run_block();
    }
  }
  return cudaSuccess;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
