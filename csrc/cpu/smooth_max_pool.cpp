// smooth_max_pool: the forward reads a plane once; the backward sums the shares before it writes them.
#include <torch/library.h>

#include "panel.h"
#include "tile.h"

namespace fastuda {

namespace {

constexpr int64_t kCached = 1024;  // number of pixels whose exponentials stay in the cache

// The pooled scores, and the log-sum-exps of k z from which their gradient is computed.
std::tuple<Tensor, Tensor> smooth_max_pool_fwd(const Tensor& logits, double k) {
  const Tensor z = readable(logits);
  const int64_t planes = z.size(0) * z.size(1), pixels = z.size(2) * z.size(3);
  Tensor pooled = at::empty({z.size(0), z.size(1)}, z.options().dtype(statistics_type(z)));
  Tensor sums = at::empty(pooled.sizes(), pooled.options());
  with_rows(z, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    S *to = pooled.mutable_data_ptr<S>(), *sum = sums.mutable_data_ptr<S>();
    at::parallel_for(0, planes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const double lse = log_sum_exp(z.const_data_ptr<T>() + plane * pixels, pixels, S(k));
        sum[plane] = S(lse);
        to[plane] = S((lse - std::log(double(pixels))) / k);
      }
    });
  });
  return {pooled, sums};
}

// out = by softmax(k x). The score only keeps the exponentials in range. They are divided by their own sum,
// because the last rounding of the score, times k, exceeds the error budget of the gradient.
template <class T, class S>
void share_out(const T* x, int64_t n, S k, S score, S by, T* out) {
  S room[kCached];
  double sum = 0;
  for (int64_t j = 0; j < n; j += kCached) sum += exp_row(x + j, std::min(kCached, n - j), score, k, room);
  const S scale = S(by / sum);
  for (int64_t j = 0; j < n; j += kCached) {
    const int64_t count = std::min(kCached, n - j);
    exp_row(x + j, count, score, k, room);
    scale_to(room, scale, count, out + j);
  }
}

Tensor smooth_max_pool_bwd(const Tensor& grad, const Tensor& logits, const Tensor& lse, double k) {
  const Tensor z = readable(logits), g = grad.to(lse.scalar_type()).contiguous();
  const Tensor sums = lse.contiguous();
  const int64_t planes = z.size(0) * z.size(1), pixels = z.size(2) * z.size(3);
  Tensor out = empty_result(z.sizes(), z.options());
  with_rows(z, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const S *by = g.const_data_ptr<S>(), *sum = sums.const_data_ptr<S>();
    at::parallel_for(0, planes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        share_out(z.const_data_ptr<T>() + plane * pixels, pixels, S(k), S(sum[plane] / k), by[plane],
                  out.mutable_data_ptr<T>() + plane * pixels);
      }
    });
  });
  return out.to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("smooth_max_pool_fwd.cpu", &smooth_max_pool_fwd);
  m.impl("smooth_max_pool_bwd.cpu", &smooth_max_pool_bwd);
}

}  // namespace fastuda
