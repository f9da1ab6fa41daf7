// CUDA threads as threads of the system, for ThreadSanitizer and AddressSanitizer, with -include: the threads
// of a block, and several blocks of a launch, run at once. Shared memory is poisoned with NaN before every
// block. Without emulated::barriers, barriers are left out: ThreadSanitizer must then report a race.
#pragma once

#define FASTUDA_EMULATED_CUDA

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "emulated_functions.h"

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaError_t = int;
inline const char* cudaGetErrorString(int) { return "an error that cannot happen here"; }

namespace emulated {

struct Block {
  std::barrier<> barrier;
  // of its own size exactly, so that AddressSanitizer knows its end
  std::unique_ptr<unsigned char[]> shared;

  Block(unsigned threads, size_t bytes) : barrier(threads), shared(new unsigned char[bytes]) {
    std::memset(shared.get(), 0xff, bytes);
  }
};
inline thread_local Block* block;
inline bool barriers = true;

constexpr int64_t kBlocksAtOnce = 3;

}  // namespace emulated

inline void __syncthreads() {
  if (emulated::barriers) emulated::block->barrier.arrive_and_wait();
}

template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

#define FASTUDA_SHARED(type, name) type* name = reinterpret_cast<type*>(emulated::block->shared.get())

namespace fastuda {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
           Arguments... arguments) {
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  for (int64_t first = 0; first < blocks; first += emulated::kBlocksAtOnce) {
    std::vector<std::unique_ptr<emulated::Block>> here;
    std::vector<std::thread> running;
    for (int64_t b = first; b < blocks && b < first + emulated::kBlocksAtOnce; ++b) {
      here.push_back(std::make_unique<emulated::Block>(unsigned(threads), size_t(shared_bytes)));
      for (int t = 0; t < threads; ++t) {
        running.emplace_back([=, block = here.back().get()] {
          emulated::block = block;
          threadIdx.x = unsigned(t);
          blockIdx.x = unsigned(b);
          kernel(arguments...);
        });
      }
    }
    for (std::thread& thread : running) thread.join();
  }
  return 0;
}

inline int read_back(void* to, const void* from, int64_t bytes, void*) {
  std::memcpy(to, from, size_t(bytes));
  return 0;
}

}  // namespace fastuda
