// Memory for a kernel's own panels and its large results.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <utility>

#include "../common.h"
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastuda {

constexpr size_t kHugePage = size_t(2) << 20;

// Requests huge pages for memory that was not touched yet. With small pages the first pass over it enters the
// operating system every 4 KiB, which costs more than the arithmetic of a sweep.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage,
                  end = (start + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Returns to the system the pages that lie entirely within memory whose content is no longer needed.
inline void drop_pages(void* memory, size_t bytes) {
#ifdef __linux__
  static const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
}

// at::empty for a result that is written once from start to end.
inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor made = at::empty(sizes, options);
  prefer_huge_pages(made.mutable_data_ptr(), made.nbytes());
  return made;
}

template <class T>
void parallel_zero(T* data, int64_t count) {
  at::parallel_for(0, count, int64_t(1) << 16, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<void*>(data + begin), 0, sizeof(T) * size_t(end - begin));
  });
}

// Memory of at least that many bytes, and its size. Large blocks reuse one that was given back if it fits,
// because the first touch of a page costs more than most kernels do with it. If none fits, as much kept
// memory is freed as is newly allocated.
std::pair<void*, size_t> take_block(size_t bytes);
// Keeps blocks of huge pages for the next call, the latest kKeptBytes of them.
void give_block(void* block, size_t bytes);
// Frees all kept blocks.
void release_blocks();

constexpr size_t kKeptBytes = size_t(64) << 20;

// Memory for count elements, given back when the object is destroyed.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) {
    const auto [block, bytes] = take_block(size_t(count) * sizeof(T));
    data_ = {static_cast<T*>(block), GiveBack{bytes}};
  }
  static Scratch zeros(int64_t count) {
    Scratch made(count);
    parallel_zero(made.data(), count);
    return made;
  }
  T* data() const { return data_.get(); }

 private:
  struct GiveBack {
    size_t bytes = 0;
    void operator()(T* p) const { give_block(p, bytes); }
  };
  std::unique_ptr<T, GiveBack> data_;
};

}  // namespace fastuda
