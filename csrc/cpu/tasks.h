// Runs work of unequal parts on all threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastuda {

// Calls work(take) on at most `most` threads; take() returns each of 0 .. count - 1 once, then -1. If the
// system delays a thread, or its tasks are long, the others wait for at most one task. The output of a task
// must not depend on the thread that runs it.
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
