// Launching, and what decides how.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/vector.cuh"

namespace fastvit::cuda {

constexpr int kWarp = 32;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("fastvit CUDA ") + what + ": " +
                             cudaGetErrorString(status));
  }
}

template <typename Args>
void launch(void (*kernel)(Args), dim3 grid, int threads, Stream stream, const Args& args,
            const char* what) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args), what);
}

// Whether rows that lie `stride` elements apart can be read kVector elements at a time.
inline bool is_vectorisable(const Array& array, int64_t stride) {
  const int64_t size = array.dtype == DType::kF32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && stride * size % 16 == 0;
}

// A grid for kernels whose threads each keep one column vector of the bias and walk down the rows:
// columns in x, as many rows in y as fill the device (2,048 threads on each multiprocessor).
struct ColumnGrid {
  dim3 blocks;
  int threads;
};

inline ColumnGrid column_grid(int64_t rows, int64_t vectors) {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  const int64_t threads = std::min<int64_t>(128, (vectors + kWarp - 1) / kWarp * kWarp);
  const int64_t across = (vectors + threads - 1) / threads;
  const int64_t wanted = processors * (2048 / threads) / across;
  const int64_t down = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(rows, 65535));
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)),
          static_cast<int>(threads)};
}

}  // namespace fastvit::cuda
