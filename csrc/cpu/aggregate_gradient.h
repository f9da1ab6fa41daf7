// The backward of spatial_aggregate with the cosine similarity.
#pragma once

#include "similarity.h"

namespace fastuda {

// Gradient of image b: out [N, channels], from grad [B, N, channels] of T, the gradient of the output, the
// forward's temperatures, log_sum_i = log sum_j exp((s_ij - 1) / t_i), and delta_i = grad_i . alpha (W x)_i.
template <class T>
void aggregate_gradient(const Features<T>& x, const Tensor& grad, int64_t b, acc_t<T> alpha,
                        const acc_t<T>* temperature, const acc_t<T>* log_sum, const acc_t<T>* delta, T* out);

}  // namespace fastuda
