// batch_norm_act of channels-last features: rows of channels, each column with its own statistics. Chunks of
// rows are read twice while they are in the cache; their results are added in a fixed order.
#include "batch_norm_act.h"

#include <torch/library.h>

#include "panel.h"

namespace fastuda {

namespace {

// Features as rows of words. If a pixel has few channels, a row holds `repeats` pixels, and a channel has as
// many columns.
template <class Word>
struct NormRows {
  using S = std::conditional_t<std::is_same_v<Word, double>, double, float>;
  int64_t channels, repeats, rows, width, words, chunk;

  NormRows(const Tensor& pixels, int64_t repeated)
      : channels(pixels.size(3)),
        repeats(repeated),
        rows(pixels.numel() / channels / repeats),
        width(channels * repeats),
        words(width / values_of<Word>),
        chunk(std::clamp<int64_t>(int64_t(1 << 16) / width, 1, 128)) {}
  int64_t chunks() const { return blocks_of(rows, chunk); }
  int64_t rows_of(int64_t part) const { return std::min(chunk, rows - part * chunk); }
  // work(part, its first word)
  template <class Work>
  void each(const Work& work) const {
    at::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) work(part, part * chunk * words);
    });
  }
  // Values of channels to values of their columns.
  void spread(const std::vector<S>& of_channels, std::vector<S>& columns) const {
    for (int64_t first = 0; first < width; first += channels) {
      for (int64_t c = 0; c < channels; ++c) columns[place(first + c)] = of_channels[c];
    }
  }
  // The column of the c-th value of a row.
  int64_t place(int64_t c) const { return c % values_of<Word> * words + c / values_of<Word>; }
  const Word* of(const Tensor& x) const { return static_cast<const Word*>(x.const_data_ptr()); }
  Word* into(const Tensor& x) const { return static_cast<Word*>(x.mutable_data_ptr()); }
};

// Calls f with the rows of pixels, in words that fit `others` too; widens float16 as a whole, see readable().
template <class F>
void with_norm_rows(const Tensor& pixels, const std::vector<Tensor>& others, F&& f) {
  const int64_t channels = pixels.size(3);
  int64_t repeats = 1, rows = pixels.numel() / channels;
  for (; channels * repeats < 64 && rows && rows % 2 == 0; rows /= 2) repeats *= 2;
  const auto even = [](const Tensor& x) { return uintptr_t(x.const_data_ptr()) % sizeof(uint32_t) == 0; };
  with_rows(pixels, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (channels * repeats % 2 == 0 && even(pixels) && std::all_of(others.begin(), others.end(), even)) {
        return f(NormRows<uint32_t>(pixels, repeats));
      }
    }
    f(NormRows<T>(pixels, repeats));
  });
}

// Scale and shift of a norm, for every column and for every channel.
template <class Rows>
struct NormColumns {
  using S = typename Rows::S;
  std::vector<S> mean, scale, shift, channel_scale, rstd;

  NormColumns(const Rows& rows, const Tensor& mean_of, const Tensor& variance_of, const Tensor& weight_of,
              const Tensor& bias_of, double eps)
      : mean(rows.width), scale(rows.width), shift(rows.width) {
    const Tensor means = mean_of.contiguous(), variances = variance_of.contiguous(),
                 weights = weight_of.contiguous(), biases = bias_of.contiguous();
    const S *each_mean = means.template const_data_ptr<S>(), *weight = weights.template const_data_ptr<S>(),
            *variance = variances.template const_data_ptr<S>(), *bias = biases.template const_data_ptr<S>();
    std::vector<S> channel_mean(rows.channels), channel_shift(rows.channels);
    channel_scale.resize(rows.channels);
    rstd.resize(rows.channels);
    for (int64_t c = 0; c < rows.channels; ++c) rstd[c] = usual(S(1) / std::sqrt(variance[c] + S(eps)));
    for (int64_t c = 0; c < rows.channels; ++c) {
      channel_mean[c] = usual(each_mean[c]);
      channel_scale[c] = usual(weight[c] * rstd[c]);
      channel_shift[c] = usual(bias[c] - channel_mean[c] * channel_scale[c]);
    }
    rows.spread(channel_mean, mean);
    rows.spread(channel_scale, scale);
    rows.spread(channel_shift, shift);
  }
  // Replaces every NaN by one that bfloat16 can hold.
  static S usual(S x) { return x != x ? std::numeric_limits<S>::quiet_NaN() : x; }
  ClampedRows<S> of(int64_t rows, int64_t words, double low, double high) const {
    return {rows, words, scale.data(), shift.data(), S(low), S(high)};
  }
};

// Means of sets of values, and sums of squared differences from them (Chan et al., 1979).
struct ColumnMoments {
  double count = 0;
  std::vector<double> mean, squares;

  explicit ColumnMoments(int64_t columns) : mean(columns), squares(columns) {}
  template <class S>
  void add(double more, const S* other_mean, const S* other_squares) {
    const double total = count + more, share = more / total, both = count * share;
    for (size_t j = 0; j < mean.size(); ++j) {
      const double apart = other_mean[j] - mean[j];
      mean[j] += apart * share;
      squares[j] += other_squares[j] + apart * apart * both;
    }
    count = total;
  }
};

std::tuple<Tensor, Tensor> batch_norm_act_moments(const Tensor& x) {
  const Tensor pixels = channel_rows(x);
  const int64_t channels = x.size(1);
  const auto options = pixels.options().dtype(statistics_type(pixels));
  const Tensor mean = at::empty({channels}, options), variance = at::empty({channels}, options);
  with_norm_rows(pixels, {}, [&](const auto& rows) {
    using Rows = std::decay_t<decltype(rows)>;
    using S = typename Rows::S;
    std::vector<S> means(rows.chunks() * rows.width), squares(means.size());
    rows.each([&](int64_t part, int64_t at) {
      column_moments(rows.of(pixels) + at, rows.rows_of(part), rows.words, means.data() + part * rows.width,
                     squares.data() + part * rows.width);
    });
    ColumnMoments columns(rows.width);
    for (int64_t part = 0; part < rows.chunks(); ++part) {
      columns.add(double(rows.rows_of(part)), means.data() + part * rows.width,
                  squares.data() + part * rows.width);
    }
    ColumnMoments all(channels);
    std::vector<double> some_means(channels), some_squares(channels);
    for (int64_t first = 0; first < rows.width; first += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        some_means[c] = columns.mean[rows.place(first + c)];
        some_squares[c] = columns.squares[rows.place(first + c)];
      }
      all.add(double(rows.rows), some_means.data(), some_squares.data());
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean.mutable_data_ptr<S>()[c] = S(all.mean[c]);
      variance.mutable_data_ptr<S>()[c] = S(all.squares[c] / all.count);
    }
  });
  return {mean, variance};
}

Tensor batch_norm_act_fwd(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                          const Tensor& bias, double eps, double low, double high) {
  const Tensor pixels = channel_rows(x);
  // not a view, because the output of a layer may be changed in place
  const Tensor made = at::empty(x.sizes(), pixels.options(), at::MemoryFormat::ChannelsLast);
  with_norm_rows(pixels, {made}, [&](const auto& rows) {
    const NormColumns columns(rows, mean, variance, weight, bias, eps);
    rows.each([&](int64_t part, int64_t at) {
      clamp_rows(rows.of(pixels) + at, columns.of(rows.rows_of(part), rows.words, low, high),
                 rows.into(made) + at);
    });
  });
  return made.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_bwd(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                      const Tensor& variance, const Tensor& weight,
                                                      const Tensor& bias, double eps, double low, double high,
                                                      bool training, bool for_x) {
  const Tensor pixels = channel_rows(x), g = channel_rows(grad.to(pixels.scalar_type()));
  const std::vector<int64_t> none{0};
  Tensor by_x = at::empty(for_x ? pixels.sizes() : at::IntArrayRef(none), pixels.options());
  const Tensor by_weight = at::empty(weight.sizes(), weight.options());
  const Tensor by_bias = at::empty(bias.sizes(), bias.options());
  with_norm_rows(pixels, {g, by_x}, [&](const auto& rows) {
    using Rows = std::decay_t<decltype(rows)>;
    using S = typename Rows::S;
    const int64_t channels = rows.channels, width = rows.width;
    const NormColumns<Rows> columns(rows, mean, variance, weight, bias, eps);
    std::vector<S> sums(rows.chunks() * width), alongs(sums.size());
    rows.each([&](int64_t part, int64_t at) {
      column_gradients(rows.of(g) + at, rows.of(pixels) + at,
                       columns.of(rows.rows_of(part), rows.words, low, high), columns.mean.data(),
                       sums.data() + part * width, alongs.data() + part * width);
    });
    const auto total = [&](const std::vector<S>& parts) {
      std::vector<double> columns(width), all(channels);
      for (size_t start = 0; start < parts.size(); start += width) {
        for (int64_t j = 0; j < width; ++j) columns[j] += parts[start + j];
      }
      for (int64_t first = 0; first < width; first += channels) {
        for (int64_t c = 0; c < channels; ++c) all[c] += columns[rows.place(first + c)];
      }
      return all;
    };
    const std::vector<double> sum = total(sums), along = total(alongs);
    std::vector<S> channel_slope(channels), channel_constant(channels), slope(width), constant(width);
    const double share = 1 / double(rows.rows * rows.repeats);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = -columns.channel_scale[c] * share, rstd = columns.rstd[c];
      by_weight.mutable_data_ptr<S>()[c] = S(along[c] * rstd);
      by_bias.mutable_data_ptr<S>()[c] = S(sum[c]);
      if (!training) continue;  // 0 of a sum that is not finite is NaN
      channel_slope[c] = columns.usual(S(scale * rstd * rstd * along[c]));
      channel_constant[c] = columns.usual(S(scale * sum[c]));
    }
    if (!for_x) return;
    rows.spread(channel_slope, slope);
    rows.spread(channel_constant, constant);
    rows.each([&](int64_t part, int64_t at) {
      gradient_rows(rows.of(g) + at, rows.of(pixels) + at,
                    columns.of(rows.rows_of(part), rows.words, low, high), columns.mean.data(), slope.data(),
                    constant.data(), rows.into(by_x) + at);
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
