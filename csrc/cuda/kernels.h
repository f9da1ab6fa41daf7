// The CUDA kernels behind a plain C ABI: raw device pointers, sizes and a stream. Neither torch nor CUDA
// headers are needed to call them. Each returns a cudaError_t; fastuda_cuda_error() says what it means.
//
// The file of an op declares its functions and is compiled in three ways: with FASTUDA_TORCH to its
// registration, with FASTUDA_SMALL to a call of every kernel for the sanitizers, otherwise to its kernels.
#pragma once

#include <cstdint>

#define FASTUDA_EXPORT extern "C" __attribute__((visibility("default")))

FASTUDA_EXPORT const char* fastuda_cuda_error(int code);

// Copies device memory to the host and waits for it.
FASTUDA_EXPORT int fastuda_read(void* to, const void* from, int64_t bytes, void* stream);
