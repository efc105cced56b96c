// LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), forward.
//
// A row stays in registers between the passes over it: a warp holds up to 1,024 values, a block up
// to 16,384. Rows that are wider, or not made of whole aligned vectors, are read again instead.

#include "cuda/launch.cuh"

namespace fastvit::cuda {
namespace {

constexpr int kRowsPerBlock = 4;      // of the warp-per-row kernel
constexpr int kMaxVectors = 4;        // of a thread
constexpr int kMaxBlock = 512;        // threads of a row
constexpr int kStridedThreads = 256;  // of the kernel that reads again

// The sum over a warp, or over the block, in every thread.
template <bool kBlock>
__device__ float sum(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  if constexpr (kBlock) {
    __shared__ float partial[kMaxBlock / kWarp];
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = lane < warps ? partial[lane] : 0.0f;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
    __syncthreads();  // the next sum writes `partial` again
  }
  return value;
}

__device__ __forceinline__ void write_statistics(const NormArgs& args, int64_t row, float mean,
                                                 float rstd) {
  if (args.mean != nullptr) args.mean[row] = mean;
  if (args.rstd != nullptr) args.rstd[row] = rstd;
}

// At most 72 registers, so that 896 threads share a multiprocessor and cover the latency of memory.
template <int kVectors, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMaxBlock : kRowsPerBlock * kWarp, kBlock ? 2 : 7)
    norm_in_registers(NormArgs args) {
  const int threads = kBlock ? blockDim.x : kWarp;
  const int thread = kBlock ? threadIdx.x : threadIdx.x % kWarp;
  const int64_t row =
      kBlock ? blockIdx.x : int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= args.rows) return;

  float values[kVectors][kVector];
  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = int64_t{v * threads + thread} * kVector;
    if (column < args.width) {
      load(args.x, row * args.x_stride + column, values[v]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total += values[v][i];
    }
  }
  const float width = static_cast<float>(args.width);
  const float mean = args.centre ? sum<kBlock>(total) / width : 0.0f;

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (int64_t{v * threads + thread} * kVector < args.width) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[v][i] -= mean;
        squares += values[v][i] * values[v][i];
      }
    }
  }
  const float rstd = rsqrtf(sum<kBlock>(squares) / width + args.eps);
  if (thread == 0) write_statistics(args, row, mean, rstd);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = int64_t{v * threads + thread} * kVector;
    if (column < args.width) {
      float scale[kVector], shift[kVector];
      load_or(args.scale, column, 1.0f, scale);
      load_or(args.shift, column, 0.0f, shift);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[v][i] = values[v][i] * rstd * scale[i] + shift[i];
      store(args.out, row * args.out_stride + column, values[v]);
    }
  }
}

__global__ void __launch_bounds__(kStridedThreads) norm_strided(NormArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t x_row = row * args.x_stride, out_row = row * args.out_stride;
  const float width = static_cast<float>(args.width);
  float value[1], mean = 0.0f;
  if (args.centre) {
    float total = 0.0f;
    for (int64_t column = threadIdx.x; column < args.width; column += blockDim.x) {
      load(args.x, x_row + column, value);
      total += value[0];
    }
    mean = sum<true>(total) / width;
  }
  float squares = 0.0f;
  for (int64_t column = threadIdx.x; column < args.width; column += blockDim.x) {
    load(args.x, x_row + column, value);
    squares += (value[0] - mean) * (value[0] - mean);
  }
  const float rstd = rsqrtf(sum<true>(squares) / width + args.eps);
  if (threadIdx.x == 0) write_statistics(args, row, mean, rstd);
  for (int64_t column = threadIdx.x; column < args.width; column += blockDim.x) {
    float scale[1], shift[1];
    load(args.x, x_row + column, value);
    load_or(args.scale, column, 1.0f, scale);
    load_or(args.shift, column, 0.0f, shift);
    value[0] = (value[0] - mean) * rstd * scale[0] + shift[0];
    store(args.out, out_row + column, value);
  }
}

template <bool kBlock>
void (*in_registers(int64_t vectors))(NormArgs) {
  switch (vectors) {
    case 1:
      return norm_in_registers<1, kBlock>;
    case 2:
      return norm_in_registers<2, kBlock>;
    case 3:
      return norm_in_registers<3, kBlock>;
    default:
      return norm_in_registers<kMaxVectors, kBlock>;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void norm(const NormArgs& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return;
  const int64_t vectors = args.width / kVector;  // of a row
  const bool whole = args.width % kVector == 0 && is_vectorisable(args.x, args.x_stride) &&
                     is_vectorisable(args.out, args.out_stride) && is_vectorisable(args.scale, 0) &&
                     is_vectorisable(args.shift, 0);
  if (!whole || vectors > int64_t{kMaxBlock} * kMaxVectors) {
    launch(norm_strided, dim3(static_cast<unsigned>(args.rows)), kStridedThreads, stream, args,
           "norm");
  } else if (vectors <= kWarp * kMaxVectors) {
    const auto blocks = static_cast<unsigned>(ceil_div(args.rows, kRowsPerBlock));
    launch(in_registers<false>(ceil_div(vectors, kWarp)), dim3(blocks), kRowsPerBlock * kWarp,
           stream, args, "norm");
  } else {
    const int threads = vectors <= 128 * kMaxVectors ? 128 : kMaxBlock;
    launch(in_registers<true>(ceil_div(vectors, threads)), dim3(static_cast<unsigned>(args.rows)),
           threads, stream, args, "norm");
  }
}

}  // namespace fastvit::cuda
