// Running mean and squared deviations of a class: the arithmetic of class_statistics on the CPU and in CUDA.
#pragma once

#include "scalar_math.h"

namespace fastuda {

template <class S>
struct Moments {
  S mean, deviation;
};

// Adds x; share is one over the number of values including x (Welford).
template <class S>
FASTUDA_HOST_DEVICE Moments<S> with_value(Moments<S> m, S x, S share) {
  const S gap = x - m.mean, mean = m.mean + gap * share;
  return {mean, m.deviation + gap * (x - mean)};
}

// Merges two sets (Chan et al.); the counts are those of a and b, and both may be 0.
template <class S>
FASTUDA_HOST_DEVICE Moments<S> merged(Moments<S> a, S count_a, Moments<S> b, S count_b) {
  const S total = count_a + count_b, part = total > S(0) ? count_b / total : S(0), gap = b.mean - a.mean;
  return {a.mean + gap * part, a.deviation + b.deviation + gap * gap * (count_a * part)};
}

}  // namespace fastuda
