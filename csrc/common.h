// What every CPU kernel shares: element types, run-time choice of the instruction set, small helpers.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "scalar_math.h"

// A leaf function compiled for AVX-512, AVX2 and plain x86-64, chosen at load time by the CPU it runs on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTUDA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTUDA_CLONES
#endif
#define FASTUDA_INLINE inline __attribute__((always_inline))

namespace fastuda {

using c10::BFloat16;

// Accumulation and statistics: double for double, float for everything else.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// exp to about one unit in the last place: 2^n times a degree-7 polynomial; saturates beyond +-87.
FASTUDA_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t scale_bits = (bits << 23) + 0x3f800000;
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  return p * scale;
}
FASTUDA_INLINE double fast_exp(double x) { return std::exp(x); }

}  // namespace fastuda
