// The backward of cycle_association_loss with the cosine similarity.
#pragma once

#include <numeric>

#include "similarity.h"

namespace fastuda {

// The cross-entropies of one side's rows in one image: sum_i w_i (lse_i - s_{i, index_i} / t_i).
template <class S>
struct Terms {
  const S *weight, *temperature, *lse;
  const int64_t* index;

  Terms(const Tensor& w, const Tensor& t, const Tensor& l, const Tensor& i, int64_t offset)
      : weight(w.const_data_ptr<S>() + offset),
        temperature(t.const_data_ptr<S>() + offset),
        lse(l.const_data_ptr<S>() + offset),
        index(i.const_data_ptr<int64_t>() + offset) {}
};

// Indices 0..n-1, those with a weight first, and the number of these.
template <class S>
std::pair<std::vector<int64_t>, int64_t> weighted_first(const S* weight, int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const auto end =
      std::stable_partition(order.begin(), order.end(), [&](int64_t i) { return weight[i] != 0; });
  return {std::move(order), end - order.begin()};
}

// Gradients of one image's features: grad_a [N, channels] and grad_b [M, channels]; every element is written.
template <class T>
void association_gradient(const Features<T>& a, const Features<T>& b, const Terms<acc_t<T>>& source,
                          const Terms<acc_t<T>>& target, int64_t image, T* grad_a, T* grad_b);

}  // namespace fastuda
