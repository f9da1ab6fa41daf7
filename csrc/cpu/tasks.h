// Work of unequal parts on all threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastuda {

// Calls work(take) on every thread, but no more than `most`; take() hands out 0 .. count - 1, each once, then
// -1. A thread that the system holds up, or whose tasks are long, then keeps no other waiting for more than a
// task. What a task writes may not depend on the thread that runs it.
template <class Work>
void share_tasks(int64_t count, int64_t most, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    return task < count ? task : int64_t(-1);
  };
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), count, most});
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(take); });
}
template <class Work>
void share_tasks(int64_t count, const Work& work) {
  share_tasks(count, count, work);
}

}  // namespace fastuda
