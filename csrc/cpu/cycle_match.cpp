// cycle_match: both hops of the argmax.
#include <torch/library.h>

#include "divergence.h"

namespace fastuda {

static std::tuple<Tensor, Tensor, Tensor, Tensor> cycle_match_fwd(const Tensor& source, const Tensor& target,
                                                                  c10::string_view similarity) {
  const bool kl = is_kl(similarity);
  const int64_t batch = source.size(0), n = source.size(1), m = target.size(1);
  const auto statistics = source.options().dtype(statistics_type(source));
  Tensor forward = at::empty({batch, n}, source.options().dtype(at::kLong));
  Tensor backward = at::empty({batch, m}, source.options().dtype(at::kLong));
  Tensor forward_best = at::empty({batch, n}, statistics), backward_best = at::empty({batch, m}, statistics);
  with_element(source, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> a(source, kl), b(target, kl);
    for (int64_t i = 0; i < batch; ++i) {
      const RowResults<S> rows{forward.mutable_data_ptr<int64_t>() + i * n,
                               forward_best.mutable_data_ptr<S>() + i * n, nullptr, nullptr};
      const RowResults<S> columns{backward.mutable_data_ptr<int64_t>() + i * m,
                                  backward_best.mutable_data_ptr<S>() + i * m, nullptr, nullptr};
      if (kl) {
        divergence_pass<T>(a, b, i, rows);
        divergence_pass<T>(b, a, i, columns);
      } else {
        both_hops<T>(a, b, i, rows, columns);
      }
    }
  });
  return {forward, backward, forward_best, backward_best};
}

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("cycle_match_fwd.cpu", &cycle_match_fwd); }

}  // namespace fastuda
