// Scalar functions that the CPU kernels and the CUDA kernels share, so that tests on a CPU cover what a GPU
// computes. No torch header, no intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTUDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTUDA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastuda {

FASTUDA_HOST_DEVICE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
FASTUDA_HOST_DEVICE float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// log to about two units in the last place for positive normal numbers; inf and NaN are returned.
FASTUDA_HOST_DEVICE float fast_log(float x) {
  int32_t bits = bits_of(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  const float m = float_of(bits);
  const float f = m - 1.0f, z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float n = float(exponent);
  const float result = f + (f * z * p - 2.12194440e-4f * n - 0.5f * z) + 0.693359375f * n;
  return x <= 3.402823466e+38f ? result : x;
}
FASTUDA_HOST_DEVICE double fast_log(double x) { return log(x); }

// Functions for which a GPU has instructions. The logarithm has an error of 2^-21.41 between 1/2 and 2, where
// it may be as large as the result, and of three units in the last place elsewhere. The error of 2^x is two
// units, and that of the quotient two if 2^-126 <= |b| <= 2^126 (CUDA C++ Programming Guide, mathematical
// functions).
FASTUDA_HOST_DEVICE float rough_exp2(float x) { return exp2f(x); }
#if defined(__CUDA_ARCH__) || defined(FASTUDA_EMULATED_CUDA)
FASTUDA_HOST_DEVICE float rough_log(float x) { return __logf(x); }
FASTUDA_HOST_DEVICE float rough_quotient(float a, float b) { return __fdividef(a, b); }
#else
FASTUDA_HOST_DEVICE float rough_log(float x) { return logf(x); }
FASTUDA_HOST_DEVICE float rough_quotient(float a, float b) { return a / b; }
#endif

}  // namespace fastuda
