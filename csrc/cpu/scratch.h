// Memory for a kernel's own panels and its large results.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../common.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastuda {

constexpr size_t kHugePage = size_t(2) << 20;

// Asks for huge pages behind memory that was not touched yet: with small ones the first pass over it enters
// the operating system every 4 KiB, which costs more than a sweep's arithmetic.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage,
                  end = (start + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// at::empty for a result that is written once from end to end.
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

// Room for count elements, released with the object.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T), unit = bytes < kHugePage ? 64 : kHugePage;
    const size_t room = std::max(unit, (bytes + unit - 1) / unit * unit);
    data_.reset(static_cast<T*>(std::aligned_alloc(unit, room)));
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_.get(), room);
  }
  static Scratch zeros(int64_t count) {
    Scratch made(count);
    parallel_zero(made.data(), count);
    return made;
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace fastuda
