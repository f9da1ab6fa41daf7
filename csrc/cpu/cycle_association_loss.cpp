// cycle_association_loss: both hops with temperatures and log-sum-exps, and the gradient of the two
// cross-entropies; the gradient for the cosine is in association_gradient.cpp.
#include <torch/library.h>

#include "association_gradient.h"
#include "divergence.h"

namespace fastuda {

namespace {

using Residuals = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Residuals cycle_association_loss_fwd(const Tensor& source, const Tensor& target, c10::string_view similarity,
                                     bool contrast) {
  const bool kl = is_kl(similarity);
  const int64_t batch = source.size(0), n = source.size(1), m = target.size(1);
  const auto make = [&](int64_t size, at::ScalarType type) {
    return at::empty({batch, size}, source.options().dtype(type));
  };
  const auto type = statistics_type(source);
  Tensor index_a = make(n, at::kLong), index_b = make(m, at::kLong), best_a = make(n, type);
  Tensor best_b = make(m, type), t_a = make(n, type), t_b = make(m, type), lse_a = make(n, type);
  Tensor lse_b = make(m, type);
  with_element(source, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> a(source, kl), b(target, kl);
    const auto results = [&](const Tensor& index, const Tensor& best, const Tensor& t, const Tensor& lse,
                             int64_t offset) {
      return RowResults<S>{index.mutable_data_ptr<int64_t>() + offset, best.mutable_data_ptr<S>() + offset,
                           t.mutable_data_ptr<S>() + offset, lse.mutable_data_ptr<S>() + offset};
    };
    for (int64_t i = 0; i < batch; ++i) {
      const RowResults<S> rows = results(index_a, best_a, t_a, lse_a, i * n);
      const RowResults<S> columns = results(index_b, best_b, t_b, lse_b, i * m);
      if (kl && !contrast) {
        divergence_pass<T>(a, b, i, rows);
        divergence_pass<T>(b, a, i, columns);
        continue;
      }
      if (!kl && (!contrast || covariance_is_cheaper(a, b))) {
        t_a.select(0, i).copy_(contrast ? covariance_temperatures(a, b, i) : at::ones({n}, t_a.options()));
        t_b.select(0, i).copy_(contrast ? covariance_temperatures(b, a, i) : at::ones({m}, t_b.options()));
        both_hops<T>(a, b, i, rows, columns);
        continue;
      }
      row_pass<T>(a, b, i, rows);
      row_pass<T>(b, a, i, columns);
    }
  });
  return {index_a, index_b, best_a, best_b, t_a, t_b, lse_a, lse_b};
}

// One hop of the KL similarity, with probabilities as queries and logarithms as keys. Takes only matched
// rows, rounded up to whole tiles, because every other number of rows would have its own generated code.
template <class S>
void kl_backward(const Features<S>& a, const Features<S>& b, const Terms<S>& terms, int64_t image, S* grad_a,
                 S* grad_b) {
  const int64_t channels = a.channels;
  const auto found = weighted_first(terms.weight, a.count);
  const std::vector<int64_t>& order = found.first;
  const int64_t matched = found.second;
  if (matched == 0) return;
  const int64_t count = round_up(matched, kRows);
  const Scratch<S> rows = Scratch<S>::zeros(count * channels);
  for (int64_t r = 0; r < matched; ++r) {
    std::copy_n(a.query(image) + order[r] * channels, channels, rows.data() + r * channels);
  }
  const Scratch<S> row_grad(count * channels), key_grad(b.count * channels);
  const DivergenceBackward<S> gradients{rows.data(),     nullptr,         count,
                                        row_grad.data(), key_grad.data(), nullptr};
  gradients.run(b, image, [&](int64_t first, int64_t taken, int64_t column, int64_t width, S* z, S*) {
    for (int64_t r = 0; r < taken; ++r) {
      S* s = z + r * kCols;
      if (first + r >= matched) {
        std::fill_n(s, width, S(0));
        continue;
      }
      const int64_t i = order[first + r], hit = terms.index[i] - column;
      const RowScale<S> similarity{S(1), a.biases(image)[i], b.scales(image) + column};
      const RowTerm<S> row{terms.weight[i] / terms.temperature[i], 1 / terms.temperature[i], terms.lse[i]};
      softmax_row(s, width, similarity, &row, nullptr);
      if (hit >= 0 && hit < width) s[hit] -= row.weight_over_t;
    }
  });
  for (int64_t r = 0; r < matched; ++r) {
    add_scaled(S(1), row_grad.data() + r * channels, channels, grad_a + order[r] * channels);
  }
  const S* p = b.query(image);
  for (int64_t k = 0; k < b.count * channels; ++k) grad_b[k] += key_grad.data()[k] / (p[k] + S(1e-10));
}

std::tuple<Tensor, Tensor> cycle_association_loss_bwd(
    const Tensor& source, const Tensor& target, const Tensor& source_weight, const Tensor& target_weight,
    const Tensor& forward_index, const Tensor& backward_index, const Tensor& source_temperature,
    const Tensor& target_temperature, const Tensor& source_lse, const Tensor& target_lse,
    c10::string_view similarity) {
  const bool kl = is_kl(similarity);
  const int64_t batch = source.size(0), n = source.size(1), m = target.size(1), channels = source.size(2);
  const Tensor w = source_weight.contiguous(), v = target_weight.contiguous();
  const Tensor i = forward_index.contiguous(), j = backward_index.contiguous();
  const Tensor t = source_temperature.contiguous(), u = target_temperature.contiguous();
  const Tensor l = source_lse.contiguous(), k = target_lse.contiguous();
  Tensor grad_source, grad_target;
  with_element(source, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> a(source, kl), b(target, kl);
    grad_source = empty_result({batch, n, a.channels}, a.queries.options());
    grad_target = empty_result({batch, m, a.channels}, a.queries.options());
    if (kl) {
      parallel_zero(grad_source.mutable_data_ptr<T>(), grad_source.numel());
      parallel_zero(grad_target.mutable_data_ptr<T>(), grad_target.numel());
    }
    for (int64_t image = 0; image < batch; ++image) {
      const Terms<S> rows(w, t, l, i, image * n), columns(v, u, k, j, image * m);
      T* da = grad_source.mutable_data_ptr<T>() + image * n * a.channels;
      T* db = grad_target.mutable_data_ptr<T>() + image * m * a.channels;
      if constexpr (std::is_same_v<T, BFloat16>) {
        association_gradient<T>(a, b, rows, columns, image, da, db);
      } else if (kl) {
        kl_backward<S>(a, b, rows, image, da, db);
        kl_backward<S>(b, a, columns, image, db, da);
      } else {
        association_gradient<T>(a, b, rows, columns, image, da, db);
      }
    }
  });
  return {as_result(grad_source, channels, source.scalar_type()),
          as_result(grad_target, channels, target.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("cycle_association_loss_fwd.cpu", &cycle_association_loss_fwd);
  m.impl("cycle_association_loss_bwd.cpu", &cycle_association_loss_bwd);
}

}  // namespace fastuda
