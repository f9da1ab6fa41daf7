// Row sweeps of depthwise_conv2d, of T in {float, BFloat16, double}.
#pragma once

#include "../common.h"

namespace fastuda {

// Pixels along a row, each the sum of as many rows of channels times rows of weights.
template <class T, class S>
struct PixelRun {
  const T* const* rows;  // of the first pixel
  const S* const* weights;
  int64_t taps;
  int64_t pixels, from_step, to_step;  // elements from one pixel to the next
};

// out [pixels, channels] = the sums of the run, of more than the bias [channels] where given.
template <class T, class S>
void sum_run(const PixelRun<T, S>& run, int64_t channels, const S* bias, T* out);

// to [channels] += sum over i < count of a[i * step_a] b[i * step_b]
template <class T, class S>
void add_inner(const T* a, int64_t step_a, const T* b, int64_t step_b, int64_t count, int64_t channels,
               S* to);

}  // namespace fastuda
