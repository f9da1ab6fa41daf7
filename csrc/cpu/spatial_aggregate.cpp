// spatial_aggregate: attention of an image to itself. The forward holds the similarities of one panel of rows
// at a time; the backward of the cosine is in aggregate_gradient.cpp.
#include <torch/library.h>

#include "aggregate_gradient.h"
#include "divergence.h"

namespace fastuda {

namespace {

// Replaces the similarities of the row block, none of which is above top, by weights; the products run on T.
template <class T>
void aggregate_image(const Features<T>& x, int64_t b, bool contrast, acc_t<T> alpha, acc_t<T> top, T* out,
                     acc_t<T>* temperature, acc_t<T>* log_sum) {
  using S = acc_t<T>;
  const int64_t n = x.count, channels = x.channels, depth = round_up(n, kPair<T>);
  Packed<T> keys(channels, n), values(n, channels);
  pack_transposed(x.key(b), channels, nullptr, n, channels, keys);
  pack_rows(x.query(b), channels, nullptr, n, channels, values);
  const T* rows = x.query(b);
  const int64_t ld = padded(n), panel = panel_rows(n, ld, sizeof(S) + sizeof(T), channels);
  share_tasks(blocks_of(n, panel), [&](const auto& take) {
    const Scratch<S> s(panel * ld), o(panel * kCols);
    const Scratch<T> operand(Left<T>::room(panel, channels)), weights(Left<T>::room(panel, depth));
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t first = task * panel, count = std::min(panel, n - first);
      const Left<T> w{weights.data(), count, depth};
      RowStatistics<S> statistics[kPanel];
      S sums[kPanel];
      similarity_rows(x, x, keys, b, first, count, operand.data(), s.data(), statistics);
      for (int64_t r = 0; r < count; ++r) {
        // the pixel's similarity to itself, which has the largest weight, is set exactly
        S *row = s.data() + r * ld, own = x.scales(b)[first + r] != 0 ? top : S(0);
        row[first + r] = own;
        const S best = std::max(statistics[r].best, own);
        const S t = contrast ? statistics[r].temperature(n) : S(1);
        sums[r] = 0;
        for (int64_t j = 0; j < n; j += kDepth) {
          sums[r] += store_softmax(row + j, std::min(kDepth, n - j), best, 1 / t, w.at(r, j));
        }
        temperature[first + r] = t;
        log_sum[first + r] = (best - top) / t + std::log(sums[r]);
        if (n < depth) *w.at(r, n) = T(0);
      }
      for (int64_t j = 0; j < values.blocks(); ++j) {
        tile_product(w, 0, count, 0, depth, values, j, o.data(), kCols, false);
        const int64_t width = std::min(kCols, channels - j * kCols);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (first + r) * channels + j * kCols;
          mix_rows(1 - alpha, rows + at, alpha / sums[r], o.data() + r * kCols, width, out + at);
        }
      }
    }
    release_tiles<T>();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_aggregate_fwd(const Tensor& x, c10::string_view similarity,
                                                                 bool contrast, double alpha) {
  const bool kl = is_kl(similarity);
  const int64_t batch = x.size(0), n = x.size(1), channels = x.size(2);
  const auto statistics = x.options().dtype(statistics_type(x));
  Tensor temperature = at::empty({batch, n}, statistics), log_sum = at::empty({batch, n}, statistics), out;
  with_element(x, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> rows(x, kl);
    out = empty_result({batch, n, rows.channels}, rows.queries.options());
    for (int64_t b = 0; b < batch; ++b) {
      T* to = out.mutable_data_ptr<T>() + b * n * rows.channels;
      S* t = temperature.mutable_data_ptr<S>() + b * n;
      S* sums = log_sum.mutable_data_ptr<S>() + b * n;
      if constexpr (std::is_same_v<T, S>) {
        if (kl && !contrast) {
          std::fill_n(t, n, S(1));
          divergence_aggregate(rows, b, S(alpha), to, sums);
          continue;
        }
      }
      aggregate_image<T>(rows, b, contrast, S(alpha), S(kl ? 0 : 1), to, t, sums);
    }
  });
  const Tensor result = as_result(out, channels, x.scalar_type());
  Tensor drift = at::zeros({batch, n}, statistics);
  if (result.scalar_type() != out.scalar_type()) {
    at::sum_out(drift, out, 2).sub_(result.sum(2, false, drift.scalar_type()));
  }
  return {result, temperature, log_sum, drift};
}

// The backward of the KL similarity for one image, all rows against all columns.
template <class S>
void kl_backward(const Features<S>& x, const S* grad, int64_t b, S alpha, const S* temperature,
                 const S* log_sum, const S* delta, S* out) {
  const int64_t size = x.count * x.channels;
  const S *rows = x.query(b), *biases = x.biases(b), *ones = x.scales(b);
  const Scratch<S> row_grad(size), key_grad(size);
  const DivergenceBackward<S> gradients{rows, grad, x.count, row_grad.data(), key_grad.data(), out};
  gradients.run(x, b, [&](int64_t first, int64_t taken, int64_t column, int64_t width, S* z, S* w) {
    for (int64_t r = 0; r < taken; ++r) {
      const int64_t i = first + r;
      const AggregateTerm<S> term{alpha,      S(1),     biases[i],     1 / temperature[i],
                                  log_sum[i], delta[i], ones + column, nullptr,
                                  nullptr,    nullptr};
      aggregate_row(z + r * kCols, w + r * kCols, nullptr, width, term, nullptr);
    }
  });
  at::parallel_for(0, size, int64_t(1) << 14, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      out[k] += (1 - alpha) * grad[k] + row_grad.data()[k] + key_grad.data()[k] / (rows[k] + S(1e-10));
    }
  });
}

// grad_i . alpha (W x)_i, where alpha W x is what the forward added to (1 - alpha) x. The part of the output
// row's sum that rounding removed is put back with the mean gradient: probabilities add up to 1, so equal
// gradients for all of them must give 0.
template <class T>
double inner_of_mixed(const T* grad, const T* x, const T* out, int64_t n, double alpha, double drift) {
  double product = 0, slope = 0;
#pragma omp simd reduction(+ : product, slope)
  for (int64_t c = 0; c < n; ++c) {
    const double g = grad[c];
    product += (double(out[c]) - (1 - alpha) * double(x[c])) * g;
    slope += g;
  }
  return product + slope / double(n) * drift;
}

Tensor spatial_aggregate_bwd(const Tensor& grad, const Tensor& x, const Tensor& out,
                             const Tensor& temperature, const Tensor& log_sum, const Tensor& drift,
                             c10::string_view similarity, double alpha) {
  const bool kl = is_kl(similarity);
  const int64_t batch = x.size(0), n = x.size(1), channels = x.size(2);
  const Tensor t = temperature.contiguous(), l = log_sum.contiguous(), lost = drift.contiguous();
  Tensor result;
  with_element(x, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> rows(x, kl);
    Tensor g = grad.to(rows.queries.scalar_type()).contiguous();
    Tensor delta = at::empty({batch, n}, rows.scale.options());
    const Tensor y = out.to(rows.queries.scalar_type()).contiguous();
    at::parallel_for(0, batch * n, 64, [&](int64_t begin, int64_t end) {
      const T *py = y.const_data_ptr<T>(), *px = rows.query(0), *pg = g.const_data_ptr<T>();
      S* to = delta.mutable_data_ptr<S>();
      for (int64_t i = begin; i < end; ++i) {
        to[i] = S(inner_of_mixed(pg + i * channels, px + i * rows.channels, py + i * channels, channels,
                                 alpha, lost.const_data_ptr<S>()[i]));
      }
    });
    if (g.size(2) != rows.channels) g = at::constant_pad_nd(g, {0, 1});
    result = empty_result({batch, n, rows.channels}, rows.queries.options());
    for (int64_t b = 0; b < batch; ++b) {
      const S *temperatures = t.const_data_ptr<S>() + b * n, *sums = l.const_data_ptr<S>() + b * n;
      const S* deltas = delta.const_data_ptr<S>() + b * n;
      T* to = result.mutable_data_ptr<T>() + b * n * rows.channels;
      if constexpr (!std::is_same_v<T, BFloat16>) {
        if (kl) {
          const T* from = g.template const_data_ptr<T>() + b * n * channels;
          kl_backward<S>(rows, from, b, S(alpha), temperatures, sums, deltas, to);
          continue;
        }
      }
      aggregate_gradient<T>(rows, g, b, S(alpha), temperatures, sums, deltas, to);
    }
  });
  return as_result(result, channels, x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("spatial_aggregate_fwd.cpu", &spatial_aggregate_fwd);
  m.impl("spatial_aggregate_bwd.cpu", &spatial_aggregate_bwd);
}

}  // namespace fastuda
