// Enough of CUDA to run kernels on a CPU, one thread of a block after the other from barrier to barrier: for
// tests, with -include. Shared memory is poisoned with NaN before every block; a barrier that not all threads
// reach is error 1.
#pragma once

#define FASTUDA_EMULATED_CUDA

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "emulated_functions.h"

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaError_t = int;
inline const char* cudaGetErrorString(int) { return "a barrier that not all threads reach"; }

namespace emulated {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool finished = false;
};
inline std::vector<Thread> threads;
inline std::vector<double> shared;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline size_t current;

inline void run_body() {
  body();
  threads[current].finished = true;
  swapcontext(&threads[current].context, &scheduler);
}

// False when some threads wait at a barrier and others have finished.
inline bool run_block(unsigned count) {
  if (threads.size() < count) threads = std::vector<Thread>(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.finished = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_body, 0);
  }
  unsigned finished = 0;
  while (finished == 0) {
    for (current = 0; current < count; ++current) {
      threadIdx.x = unsigned(current);
      swapcontext(&scheduler, &threads[current].context);
      finished += threads[current].finished;
    }
  }
  return finished == count;
}

}  // namespace emulated

inline void __syncthreads() {
  const size_t me = emulated::current;
  swapcontext(&emulated::threads[me].context, &emulated::scheduler);
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

#define FASTUDA_SHARED(type, name) type* name = reinterpret_cast<type*>(emulated::shared.data())

namespace fastuda {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
           Arguments... arguments) {
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  emulated::body = [=] { kernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    emulated::shared.resize(size_t(shared_bytes) / sizeof(double) + 1);
    std::memset(emulated::shared.data(), 0xff, emulated::shared.size() * sizeof(double));
    blockIdx.x = unsigned(block);
    if (!emulated::run_block(unsigned(threads))) return 1;
  }
  return 0;
}

inline int read_back(void* to, const void* from, int64_t bytes, void*) {
  std::memcpy(to, from, size_t(bytes));
  return 0;
}

}  // namespace fastuda
