// Row sweeps of depthwise_conv2d, for T in {float, BFloat16, double}.
#pragma once

#include "../common.h"

namespace fastuda {

// Pixels along a row; each is a sum of `taps` rows of channels times rows of weights.
template <class T, class S>
struct PixelRun {
  const T* const* rows;  // of the first pixel
  const S* const* weights;
  int64_t taps;
  int64_t pixels, from_step, to_step;  // elements from one pixel to the next
};

// out [pixels, channels] = the sums of the run, plus the bias [channels] if given.
template <class T, class S>
void sum_run(const PixelRun<T, S>& run, int64_t channels, const S* bias, T* out);

// to [pixels, channels] = pixels of x that are `step` elements apart
template <class T, class S>
void widen_pixels(const T* x, int64_t step, int64_t pixels, int64_t channels, S* to);

// The inputs of a run of gradients: one pixel of each of `taps` rows, `step` elements further per gradient.
template <class S>
struct MetRows {
  const S* const* rows;
  S* const* sums;  // of each row
  int64_t taps, step;
};

// sums[t] [channels] += sum over i < count of g[i * step] rows[t][i * met.step]
template <class T, class S>
void add_products(const T* g, int64_t step, const MetRows<S>& met, int64_t count, int64_t channels);

}  // namespace fastuda
