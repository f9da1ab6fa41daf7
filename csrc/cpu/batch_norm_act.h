// Row sweeps of batch_norm_act, of T in {float, BFloat16, double}; rows are [rows, width], contiguous.
#pragma once

#include "../common.h"

namespace fastuda {

// Of every column: the mean and the sum of the squared differences to it, from two passes.
template <class T, class S>
void column_moments(const T* x, int64_t rows, int64_t width, S* mean, S* squares);

// y = clamp(scale x + shift, low, high), column by column.
template <class S>
struct ClampedRows {
  int64_t rows, width;
  const S *scale, *shift;
  S low, high;
};

template <class T, class S>
void clamp_rows(const T* x, const ClampedRows<S>& y, T* out);

// sum += sum of g and along += sum of g (x - mean) of every column, where g is grad where y is not clamped.
template <class T, class S>
void column_gradients(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, S* sum, S* along);

// out = scale g + slope (x - mean) + constant
template <class T, class S>
void gradient_rows(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, const S* slope,
                   const S* constant, T* out);

}  // namespace fastuda
