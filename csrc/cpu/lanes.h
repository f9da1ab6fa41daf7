// A register of sums, its loads and its stores.
#pragma once

#include "widen.h"

namespace fastuda {

// 64 bytes of sums, in one register of AVX-512 or in two of AVX2.
template <class S>
struct Lanes {
  static constexpr int64_t count = 64 / sizeof(S);
  typedef S type __attribute__((vector_size(64)));
};
template <class S>
using lanes_t = typename Lanes<S>::type;

FASTUDA_INLINE void load_lanes(const float* from, lanes_t<float>& x) { std::memcpy(&x, from, sizeof(x)); }
FASTUDA_INLINE void load_lanes(const double* from, lanes_t<double>& x) { std::memcpy(&x, from, sizeof(x)); }
FASTUDA_INLINE void load_lanes(const BFloat16* from, lanes_t<float>& x) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Word __attribute__((vector_size(64)));
  Half half;
  std::memcpy(&half, from, sizeof(half));
  const Word bits = __builtin_convertvector(half, Word) << 16;
  std::memcpy(&x, &bits, sizeof(x));
}

template <class S>
FASTUDA_INLINE void store_lanes(const lanes_t<S>& x, S* to) {
  std::memcpy(to, &x, sizeof(x));
}
template <class S>
FASTUDA_INLINE void store_lanes(const lanes_t<float>& x, BFloat16* to) {
  float each[Lanes<float>::count];
  std::memcpy(each, &x, sizeof(x));
#pragma omp simd
  for (int64_t j = 0; j < Lanes<float>::count; ++j) narrow(each[j], to + j);
}

}  // namespace fastuda
