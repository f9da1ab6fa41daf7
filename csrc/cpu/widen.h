// Conversion of elements to their accumulation type and back, written so that compilers vectorise it.
#pragma once

#include "../common.h"

namespace fastuda {

FASTUDA_INLINE float widen(float x) { return x; }
FASTUDA_INLINE double widen(double x) { return x; }
FASTUDA_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTUDA_INLINE void narrow(float x, float* out) { *out = x; }
FASTUDA_INLINE void narrow(double x, double* out) { *out = x; }
FASTUDA_INLINE void narrow(float x, BFloat16* out) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->x = uint16_t(x != x ? 0x7fc0u : rounded);
}

}  // namespace fastuda
