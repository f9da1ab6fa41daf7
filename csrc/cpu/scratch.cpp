#include "scratch.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace fastuda {

namespace {

constexpr size_t kLine = 64, kPages = size_t(64) << 10;  // whole pages on every system

struct Block {
  void* memory;
  size_t bytes;
};

std::mutex mutex;
std::deque<Block> kept;  // the block that was unused for longest comes first
size_t kept_bytes = 0;

void* aligned(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

// Blocks of huge pages are mapped one by one, because the C library's heap would keep the holes between them.
#ifdef __linux__
void* map_block(size_t bytes) {
  const size_t mapped = bytes + kHugePage;
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const auto from = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (from + kHugePage - 1) / kHugePage * kHugePage, end = first + bytes;
  if (first > from) munmap(start, first - from);
  if (from + mapped > end) munmap(reinterpret_cast<void*>(end), from + mapped - end);
  void* memory = reinterpret_cast<void*>(first);
  prefer_huge_pages(memory, bytes);
  return memory;
}
void unmap_block(const Block& block) { munmap(block.memory, block.bytes); }
#else
void* map_block(size_t bytes) { return aligned(kHugePage, bytes); }
void unmap_block(const Block& block) { std::free(block.memory); }
#endif

void free_down_to(size_t bytes) {
  while (kept_bytes > bytes) {
    unmap_block(kept.front());
    kept_bytes -= kept.front().bytes;
    kept.pop_front();
  }
}

// A block that was given back. If none fits, returns nothing and frees as much kept memory as was requested.
Block reuse(size_t room) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto best = kept.end();
  for (auto block = kept.begin(); block != kept.end(); ++block) {
    const bool fits = room <= block->bytes && block->bytes <= 2 * room;
    if (fits && (best == kept.end() || block->bytes < best->bytes)) best = block;
  }
  if (best == kept.end()) {
    free_down_to(kept_bytes > room ? kept_bytes - room : 0);
    return {nullptr, 0};
  }
  const Block found = *best;
  kept_bytes -= found.bytes;
  kept.erase(best);
  return found;
}

}  // namespace

std::pair<void*, size_t> take_block(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t unit = huge ? kPages : kLine, room = std::max(unit, (bytes + unit - 1) / unit * unit);
  if (huge) {
    const Block found = reuse(room);
    if (found.memory != nullptr) return {found.memory, found.bytes};
  }
  const auto make = [&] { return huge ? map_block(room) : aligned(kLine, room); };
  void* memory = make();
  if (memory == nullptr) {
    release_blocks();
    memory = make();
  }
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, room};
}

void give_block(void* memory, size_t bytes) {
  if (bytes < kHugePage) {
    std::free(memory);
    return;
  }
  if (bytes > kKeptBytes) {
    unmap_block({memory, bytes});
    return;
  }
#if defined(__linux__) && defined(MADV_FREE)
  madvise(memory, bytes, MADV_FREE);  // the system may take the pages when memory runs short
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
