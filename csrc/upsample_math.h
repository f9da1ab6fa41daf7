// The position of an output of a bilinear upsampling between its sources, for the CPU and the CUDA kernels.
#pragma once

#include "scalar_math.h"

namespace fastuda {

// The two sources of an output along one axis and the weight of the second, as in torch's interpolate.
struct Between {
  int32_t first, second;
  double share;
};
FASTUDA_HOST_DEVICE Between sources_of(int64_t output, int64_t from, int64_t to, bool align_corners) {
  double place = 0.0;
  if (align_corners) {
    place = to > 1 ? double(from - 1) / double(to - 1) * double(output) : 0.0;
  } else {
    place = double(from) / double(to) * (double(output) + 0.5) - 0.5;
    place = place > 0.0 ? place : 0.0;
  }
  const int32_t last = int32_t(from - 1);
  const int32_t first = int32_t(place) < last ? int32_t(place) : last;
  return {first, first < last ? first + 1 : last, place - first};
}

template <class S>
FASTUDA_HOST_DEVICE S mixed(S a, S b, S share) {
  return a + share * (b - a);
}

// A score with -inf, the logit of a masked class, as a finite number, because -inf - (-inf) is NaN.
FASTUDA_HOST_DEVICE float least_score() { return -1.5e38f; }
FASTUDA_HOST_DEVICE float bounded(float x) { return x < least_score() ? least_score() : x; }

}  // namespace fastuda
