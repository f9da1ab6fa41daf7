// Parts that all CPU kernels share: element types, run-time choice of the instruction set, small helpers.
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

// exp for arguments of a softmax: 2^n times a degree-6 polynomial of the rest of x / ln 2. The error is one
// unit in the last place plus x times that; the result saturates below -86 and above 88. Adding 1.5 2^23 +
// 127 rounds to whole numbers and leaves n + 127, the exponent of 2^n, in the lowest bits.
FASTUDA_INLINE float fast_exp(float x) {
  x = x < -86.0f ? -86.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float y = x * 1.44269504f, shifted = y + 12583039.0f, r = y - (shifted - 12583039.0f);
  float p = 1.5353361960e-4f;
  p = p * r + 1.3398875017e-3f;
  p = p * r + 9.6184369177e-3f;
  p = p * r + 5.5503323674e-2f;
  p = p * r + 2.4022647738e-1f;
  p = p * r + 6.9314718246e-1f;
  p = p * r + 1.0f;
  return p * float_of(bits_of(shifted) << 23);
}
FASTUDA_INLINE double fast_exp(double x) { return std::exp(x); }

}  // namespace fastuda
