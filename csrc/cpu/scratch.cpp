#include "scratch.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace fastuda {

namespace {

struct Block {
  void* memory;
  size_t bytes;
};

std::mutex mutex;
std::deque<Block> kept;  // the longest unused first
size_t kept_bytes = 0;

void free_down_to(size_t bytes) {
  while (kept_bytes > bytes) {
    std::free(kept.front().memory);
    kept_bytes -= kept.front().bytes;
    kept.pop_front();
  }
}

}  // namespace

std::pair<void*, size_t> take_block(size_t bytes) {
  const size_t unit = bytes < kHugePage ? 64 : kHugePage;
  const size_t room = std::max(unit, (bytes + unit - 1) / unit * unit);
  if (unit == kHugePage) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto best = kept.end();
    for (auto block = kept.begin(); block != kept.end(); ++block) {
      const bool fits = room <= block->bytes && block->bytes <= 2 * room;
      if (fits && (best == kept.end() || block->bytes < best->bytes)) best = block;
    }
    if (best != kept.end()) {
      const Block found = *best;
      kept_bytes -= found.bytes;
      kept.erase(best);
      return {found.memory, found.bytes};
    }
  }
  void* memory = std::aligned_alloc(unit, room);
  if (memory == nullptr) {
    release_blocks();
    memory = std::aligned_alloc(unit, room);
  }
  if (memory == nullptr) throw std::bad_alloc();
  prefer_huge_pages(memory, room);
  return {memory, room};
}

void give_block(void* memory, size_t bytes) {
  if (bytes < kHugePage || bytes > kKeptBytes) {
    std::free(memory);
    return;
  }
#if defined(__linux__) && defined(MADV_FREE)
  madvise(memory, bytes, MADV_FREE);  // the system may have the pages when it runs short
#endif
  const std::lock_guard<std::mutex> lock(mutex);
  free_down_to(kKeptBytes - bytes);
  kept.push_back({memory, bytes});
  kept_bytes += bytes;
}

void release_blocks() {
  const std::lock_guard<std::mutex> lock(mutex);
  free_down_to(0);
}

}  // namespace fastuda
