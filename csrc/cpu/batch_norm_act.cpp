// batch_norm_act of channels-last features: rows of channels, each column with its own statistics. Chunks of
// rows are passed twice while they are in the cache; what they give is added in a fixed order.
#include "batch_norm_act.h"

#include <torch/library.h>

#include "panel.h"

namespace fastuda {

namespace {

// Features as rows of channels. A row holds `repeats` pixels where a pixel has few channels, and then a
// channel has as many columns.
template <class T>
struct NormRows {
  int64_t channels, repeats = 1, width, rows, chunk;

  explicit NormRows(const Tensor& pixels) : channels(pixels.size(3)) {
    rows = pixels.numel() / channels;
    while (channels * repeats < 64 && rows && rows % 2 == 0) {
      repeats *= 2;
      rows /= 2;
    }
    width = channels * repeats;
    chunk = std::clamp<int64_t>(int64_t(1 << 17) / width, 1, 256);
  }
  int64_t chunks() const { return blocks_of(rows, chunk); }
  int64_t rows_of(int64_t part) const { return std::min(chunk, rows - part * chunk); }
  // work(part, where it begins)
  template <class Work>
  void each(const Work& work) const {
    at::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) work(part, part * chunk * width);
    });
  }
};

// [B, C, h, w] -> [B, h, w, C], of channels-last features a view
Tensor norm_pixels(const Tensor& x) { return readable(x.permute({0, 2, 3, 1})); }

// What a norm does to a channel, `repeats` times one after the other.
template <class S>
struct NormColumns {
  std::vector<S> mean, scale, shift, rstd;

  NormColumns(const Tensor& mean_of, const Tensor& variance, const Tensor& weight, const Tensor& bias,
              double eps, int64_t channels, int64_t repeats) {
    const Tensor means = mean_of.contiguous(), variances = variance.contiguous(),
                 weights = weight.contiguous(), biases = bias.contiguous();
    for (int64_t i = 0; i < channels * repeats; ++i) {
      const int64_t c = i % channels;
      rstd.push_back(S(1 / std::sqrt(variances.const_data_ptr<S>()[c] + eps)));
      mean.push_back(means.const_data_ptr<S>()[c]);
      scale.push_back(weights.const_data_ptr<S>()[c] * rstd.back());
      shift.push_back(biases.const_data_ptr<S>()[c] - mean.back() * scale.back());
    }
  }
  ClampedRows<S> rows(int64_t count, double low, double high) const {
    return {count, int64_t(scale.size()), scale.data(), shift.data(), S(low), S(high)};
  }
};

std::tuple<Tensor, Tensor> batch_norm_act_moments(const Tensor& x) {
  const Tensor pixels = norm_pixels(x);
  const int64_t channels = x.size(1);
  const auto options = pixels.options().dtype(statistics_type(pixels));
  const Tensor mean = at::empty({channels}, options), variance = at::empty({channels}, options);
  with_rows(pixels, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const NormRows<T> rows(pixels);
    std::vector<S> means(rows.chunks() * rows.width), squares(means.size());
    rows.each([&](int64_t part, int64_t at) {
      column_moments<T, S>(pixels.const_data_ptr<T>() + at, rows.rows_of(part), rows.width,
                           means.data() + part * rows.width, squares.data() + part * rows.width);
    });
    // of two sets of values from those of each (Chan et al., 1979)
    std::vector<double> all_mean(channels), all_squares(channels);
    double count = 0;
    for (int64_t set = 0; set < rows.chunks() * rows.repeats; ++set) {
      const double more = double(rows.rows_of(set / rows.repeats)), total = count + more;
      const S *set_mean = means.data() + set * channels, *set_squares = squares.data() + set * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double apart = set_mean[c] - all_mean[c];
        all_mean[c] += apart * (more / total);
        all_squares[c] += set_squares[c] + apart * apart * (count * more / total);
      }
      count = total;
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean.mutable_data_ptr<S>()[c] = S(all_mean[c]);
      variance.mutable_data_ptr<S>()[c] = S(all_squares[c] / count);
    }
  });
  return {mean, variance};
}

Tensor batch_norm_act_fwd(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                          const Tensor& bias, double eps, double low, double high) {
  const Tensor pixels = norm_pixels(x);
  // no view: what a layer gives may be changed in place
  const Tensor made = at::empty(x.sizes(), pixels.options(), at::MemoryFormat::ChannelsLast);
  with_rows(pixels, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const NormRows<T> rows(pixels);
    const NormColumns<S> columns(mean, variance, weight, bias, eps, rows.channels, rows.repeats);
    rows.each([&](int64_t part, int64_t at) {
      clamp_rows<T, S>(pixels.const_data_ptr<T>() + at, columns.rows(rows.rows_of(part), low, high),
                       made.mutable_data_ptr<T>() + at);
    });
  });
  return made.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_bwd(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                      const Tensor& variance, const Tensor& weight,
                                                      const Tensor& bias, double eps, double low, double high,
                                                      bool training, bool for_x) {
  const Tensor pixels = norm_pixels(x), g = norm_pixels(grad.to(pixels.scalar_type()));
  const std::vector<int64_t> none{0};
  Tensor by_x = at::empty(for_x ? pixels.sizes() : at::IntArrayRef(none), pixels.options());
  const Tensor by_weight = at::empty(weight.sizes(), weight.options());
  const Tensor by_bias = at::empty(bias.sizes(), bias.options());
  with_rows(pixels, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const NormRows<T> rows(pixels);
    const int64_t channels = rows.channels;
    const NormColumns<S> columns(mean, variance, weight, bias, eps, channels, rows.repeats);
    std::vector<S> sums(rows.chunks() * rows.width), alongs(sums.size());
    rows.each([&](int64_t part, int64_t at) {
      column_gradients<T, S>(g.const_data_ptr<T>() + at, pixels.const_data_ptr<T>() + at,
                             columns.rows(rows.rows_of(part), low, high), columns.mean.data(),
                             sums.data() + part * rows.width, alongs.data() + part * rows.width);
    });
    std::vector<double> sum(channels), along(channels);
    for (size_t i = 0; i < sums.size(); i += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += sums[i + c];
        along[c] += alongs[i + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      by_weight.mutable_data_ptr<S>()[c] = S(along[c] * columns.rstd[c]);
      by_bias.mutable_data_ptr<S>()[c] = S(sum[c]);
    }
    if (!for_x) return;
    std::vector<S> slope(rows.width), constant(rows.width);
    const double share = training ? 1 / double(rows.rows * rows.repeats) : 0;
    for (int64_t i = 0; i < rows.width; ++i) {
      const double scale = columns.scale[i], rstd = columns.rstd[i];
      slope[i] = S(-scale * rstd * rstd * along[i % channels] * share);
      constant[i] = S(-scale * sum[i % channels] * share);
    }
    rows.each([&](int64_t part, int64_t at) {
      gradient_rows<T, S>(g.const_data_ptr<T>() + at, pixels.const_data_ptr<T>() + at,
                          columns.rows(rows.rows_of(part), low, high), columns.mean.data(), slope.data(),
                          constant.data(), by_x.mutable_data_ptr<T>() + at);
    });
  });
  if (for_x) by_x = by_x.permute({0, 3, 1, 2});
  return {by_x.to(x.scalar_type()), by_weight, by_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("batch_norm_act_moments.cpu", &batch_norm_act_moments);
  m.impl("batch_norm_act_fwd.cpu", &batch_norm_act_fwd);
  m.impl("batch_norm_act_bwd.cpu", &batch_norm_act_bwd);
}

}  // namespace fastuda
