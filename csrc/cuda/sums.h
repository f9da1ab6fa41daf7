// Sums over a block, and over the results of blocks, in a fixed order, so that two runs agree bit for bit.
#pragma once

#include "launch.h"

namespace fastuda {

// The sum of `value` over the threads of the block, in thread 0; memory holds one double per thread. All
// threads of the block call this together.
template <int Threads>
__device__ double block_sum(double value, double* memory) {
  __syncthreads();
  memory[threadIdx.x] = value;
  __syncthreads();
  for (int half = Threads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) memory[threadIdx.x] += memory[threadIdx.x + half];
    __syncthreads();
  }
  return memory[0];
}

constexpr int kSumThreads = 256;

// Writes the sum of `count` doubles to `total`; a second block writes the sum of the next ones to `second`.
template <class = void>
__global__ void __launch_bounds__(kSumThreads, 4)
    add_partials(const double* partial, int64_t count, float* total, float* second) {
  FASTUDA_SHARED(double, memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partial[blockIdx.x * count + i];
  sum = block_sum<kSumThreads>(sum, memory);
  if (threadIdx.x == 0) *(blockIdx.x ? second : total) = float(sum);
}

inline int launch_sums(const double* partial, int64_t count, float* total, float* second, void* stream) {
  return launch(add_partials<>, second ? 2 : 1, kSumThreads, kSumThreads * int64_t(sizeof(double)), stream,
                partial, count, total, second);
}

}  // namespace fastuda
