// Launches kernels and declares their shared memory. The test that runs blocks on the CPU has its own
// version.
#pragma once

#ifndef FASTUDA_EMULATED_CUDA

#include <cuda_runtime.h>

#include <cstdint>

// `name` points to the block's dynamic shared memory.
#define FASTUDA_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char shared_memory[]; \
  type* name = reinterpret_cast<type*>(shared_memory)

namespace fastuda {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (blocks == 0) return 0;
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return int(cudaGetLastError());
}

inline int read_back(void* to, const void* from, int64_t bytes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t copied = cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToHost, on);
  return int(copied != cudaSuccess ? copied : cudaStreamSynchronize(on));
}

}  // namespace fastuda

#endif
