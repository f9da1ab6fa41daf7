// class_statistics: one pass over the features, a block of rows per task; blocks are merged in order, so that
// the result does not depend on the number of threads.
#include <torch/library.h>

#include "../class_statistics_math.h"
#include "../tensors.h"

namespace fastuda {

namespace {

constexpr int64_t kRows = 512;

template <class S>
FASTUDA_INLINE void add_body(const S* x, int64_t width, S share, S* mean, S* deviation) {
#pragma omp simd
  for (int64_t a = 0; a < width; ++a) {
    const Moments<S> m = with_value(Moments<S>{mean[a], deviation[a]}, x[a], share);
    mean[a] = m.mean;
    deviation[a] = m.deviation;
  }
}
FASTUDA_CLONES void add_row(const float* x, int64_t width, float share, float* mean, float* deviation) {
  add_body(x, width, share, mean, deviation);
}
void add_row(const double* x, int64_t width, double share, double* mean, double* deviation) {
  add_body(x, width, share, mean, deviation);
}

std::tuple<Tensor, Tensor, Tensor> class_statistics_fwd(const Tensor& features, const Tensor& labels,
                                                        int64_t classes, int64_t ignore_index) {
  const auto type = statistics_type(features);
  const Tensor x = features.to(type).contiguous(), y = labels.to(at::kLong).contiguous();
  const int64_t rows = x.size(0), width = x.size(1), blocks = blocks_of(rows, kRows), plane = classes * width;
  Tensor count = at::zeros({classes}, x.options()), mean = at::zeros({classes, width}, x.options());
  Tensor variance = at::zeros({classes, width}, x.options());
  const auto run = [&](auto element) {
    using S = decltype(element);
    std::vector<S> counts(blocks * classes, S(0)), means(blocks * plane, S(0)),
        deviations(blocks * plane, S(0));
    const S* from = x.const_data_ptr<S>();
    const int64_t* label = y.const_data_ptr<int64_t>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t i = block * kRows; i < std::min(rows, (block + 1) * kRows); ++i) {
          const int64_t k = label[i];
          if (k == ignore_index || k < 0 || k >= classes) continue;
          S& n = counts[block * classes + k];
          n += S(1);
          const int64_t at = block * plane + k * width;
          add_row(from + i * width, width, S(1) / n, means.data() + at, deviations.data() + at);
        }
      }
    });
    S *n = count.mutable_data_ptr<S>(), *m = mean.mutable_data_ptr<S>(), *v = variance.mutable_data_ptr<S>();
    at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t block = 0; block < blocks; ++block) {
          const S here = counts[block * classes + k];
          if (here == S(0)) continue;
          for (int64_t a = k * width; a < (k + 1) * width; ++a) {
            const Moments<S> other{means[block * plane + a], deviations[block * plane + a]};
            const Moments<S> both = merged(Moments<S>{m[a], v[a]}, n[k], other, here);
            m[a] = both.mean;
            v[a] = both.deviation;
          }
          n[k] += here;
        }
        for (int64_t a = k * width; a < (k + 1) * width; ++a) v[a] /= std::max(n[k], S(1));
      }
    });
  };
  if (type == at::kDouble) {
    run(double());
  } else {
    run(float());
  }
  return {count, mean, variance};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("class_statistics_fwd.cpu", &class_statistics_fwd); }

}  // namespace fastuda
