// Memory for a kernel's own panels.
#pragma once

#include <ATen/Parallel.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../common.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastuda {

// Room for count elements, released with the object. Large ones ask for huge pages: with small ones the kernel
// would enter the operating system every 4 KiB of its first pass, which costs as much as the arithmetic there.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) {
    constexpr size_t huge = size_t(2) << 20;
    const size_t bytes = size_t(count) * sizeof(T), unit = bytes < huge ? 64 : huge;
    const size_t room = std::max(unit, (bytes + unit - 1) / unit * unit);
    data_.reset(static_cast<T*>(std::aligned_alloc(unit, room)));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (unit == huge) madvise(data_.get(), room, MADV_HUGEPAGE);
#endif
  }
  static Scratch zeros(int64_t count) {
    Scratch made(count);
    at::parallel_for(0, count, int64_t(1) << 16, [&](int64_t begin, int64_t end) {
      std::memset(made.data() + begin, 0, sizeof(T) * size_t(end - begin));
    });
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
