// depthwise_conv2d of channels-last features. An output pixel is a sum of a few rows of channels, each
// multiplied by a row of the weights, and so is the gradient of an input pixel. The gradient of a weight is a
// sum over pixels whose channels stay in registers.
#include "depthwise_conv2d.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "panel.h"

namespace fastuda {

namespace {

constexpr int64_t kTaskLanes = 64;     // channels of a task of the weight gradient
constexpr int64_t kTaskPixels = 1024;  // pixels of such a task, in whole rows

// One axis: output o of `outputs` reads input o stride - padding + k dilation of `inputs`, k < kernel.
struct Axis {
  int64_t inputs, outputs, kernel, stride, padding, dilation;

  // the input that output o reads at k, or -1
  int64_t input_of(int64_t o, int64_t k) const {
    const int64_t i = o * stride - padding + k * dilation;
    return i >= 0 && i < inputs ? i : -1;
  }
  // the output that reads input i at k, or -1
  int64_t output_of(int64_t i, int64_t k) const {
    const int64_t from = i + padding - k * dilation;
    return from >= 0 && from % stride == 0 && from / stride < outputs ? from / stride : -1;
  }
};

// Columns first, first + step, ... that use the same columns of the kernel, and what those read at `first`.
struct EqualColumns {
  int64_t first, count;
  std::vector<std::pair<int64_t, int64_t>> met;
};

template <class Meets>
std::vector<EqualColumns> columns_of(int64_t width, int64_t kernel, int64_t step, const Meets& meets) {
  std::vector<EqualColumns> found;
  for (int64_t start = 0; start < std::min(step, width); ++start) {
    const size_t before = found.size();
    for (int64_t x = start; x < width; x += step) {
      EqualColumns next{x, 1, {}};
      for (int64_t j = 0; j < kernel; ++j) {
        if (meets(x, j) >= 0) next.met.emplace_back(j, meets(x, j));
      }
      const auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
      if (found.size() > before && std::equal(next.met.begin(), next.met.end(), found.back().met.begin(),
                                              found.back().met.end(), same)) {
        ++found.back().count;
      } else {
        found.push_back(std::move(next));
      }
    }
  }
  return found;
}

struct Shape {
  int64_t batch, channels;
  Axis down, across;

  Shape(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation)
      : batch(x.size(0)),
        channels(x.size(1)),
        down(axis(x.size(2), weight.size(2), stride, padding, dilation)),
        across(axis(x.size(3), weight.size(3), stride, padding, dilation)) {}
  static Axis axis(int64_t inputs, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return {inputs,  (inputs + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1,
            kernel,  stride,
            padding, dilation};
  }
};

// weight [C, 1, k, k] -> [k k, C]
Tensor weight_rows(const Tensor& weight, at::ScalarType type) {
  return weight.to(type).flatten(1).t().contiguous();
}

// out [B, rows, columns, C]; each pixel is a sum over the kernel of pixels of `from` times rows of weights.
// row(y, i) and column(x, j) give these pixels, or -1. Neighbouring columns of a run are `to_step` columns of
// out and `from_step` columns of `from` apart.
template <class T, class Row, class Column>
void sum_pixels(const Tensor& from, const Tensor& weights, const acc_t<T>* bias, const Tensor& out,
                const Shape& shape, int64_t from_step, int64_t to_step, const Row& row,
                const Column& column) {
  using S = acc_t<T>;
  const int64_t height = out.size(1), width = out.size(2), channels = out.size(3), from_h = from.size(1),
                from_w = from.size(2), kernel_h = shape.down.kernel, kernel_w = shape.across.kernel;
  const auto runs = columns_of(width, kernel_w, to_step, column);
  at::parallel_for(0, out.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(kernel_h * kernel_w);
    std::vector<const S*> met(kernel_h * kernel_w);
    for (int64_t line = begin; line < end; ++line) {
      const T* image = from.const_data_ptr<T>() + line / height * from_h * from_w * channels;
      T* to = out.mutable_data_ptr<T>() + line * width * channels;
      for (const EqualColumns& run : runs) {
        int64_t taps = 0;
        for (int64_t i = 0; i < kernel_h; ++i) {
          const int64_t y = row(line % height, i);
          if (y < 0) continue;
          for (const auto& [j, x] : run.met) {
            rows[taps] = image + (y * from_w + x) * channels;
            met[taps++] = weights.const_data_ptr<S>() + (i * kernel_w + j) * channels;
          }
        }
        sum_run<T, S>({rows.data(), met.data(), taps, run.count, from_step * channels, to_step * channels},
                      channels, bias, to + run.first * channels);
      }
    }
  });
}

// Whether to take oneDNN's forward: 0.4 to 0.9 of our time where its depthwise kernel runs, which has
// at most 4 columns of padding with AVX2 and 6 with AVX-512. Its backward is far slower than ours.
bool library_forward(at::ScalarType type, int64_t padding) {
  constexpr int64_t most_padding = 4;
  return at::hasMKLDNN() && padding <= most_padding &&
         (type == at::kFloat || (type == at::kBFloat16 && has_bf16_gemm()));
}

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            int64_t stride, int64_t padding, int64_t dilation) {
  const at::ScalarType type = x.scalar_type();
  if (library_forward(type, padding)) {
    const at::AutoDispatchBelowAutograd guard;
    const Tensor read = x.contiguous(at::MemoryFormat::ChannelsLast);
    const std::optional<Tensor> added = bias ? std::make_optional(bias->to(type)) : std::nullopt;
    return at::conv2d(read, weight.to(type), added, stride, padding, dilation, x.size(1))
        .contiguous(at::MemoryFormat::ChannelsLast);
  }
  const Shape s(x, weight, stride, padding, dilation);
  const Tensor rows = channel_rows(x), weights = weight_rows(weight, statistics_type(rows));
  const Tensor added = bias ? bias->to(weights.scalar_type()).contiguous() : Tensor();
  // not a view, because the output of a layer may be changed in place
  const Tensor made = at::empty({s.batch, s.channels, s.down.outputs, s.across.outputs}, rows.options(),
                                at::MemoryFormat::ChannelsLast);
  const Tensor out = made.permute({0, 2, 3, 1});
  with_rows(rows, [&](auto element) {
    using T = decltype(element);
    sum_pixels<T>(
        rows, weights, bias ? added.const_data_ptr<acc_t<T>>() : nullptr, out, s, stride, 1,
        [&](int64_t o, int64_t k) { return s.down.input_of(o, k); },
        [&](int64_t o, int64_t k) { return s.across.input_of(o, k); });
  });
  return made.to(x.scalar_type());
}

// out [k k, C]: tasks own kTaskLanes channels and some rows of x, each of which they widen once for all taps;
// their parts are added in a fixed order.
template <class T>
Tensor sum_weights(const Tensor& grad, const Tensor& x, const Shape& s) {
  using S = acc_t<T>;
  const int64_t channels = s.channels, height = s.down.inputs, width = s.across.inputs,
                kernel = s.across.kernel, taps = s.down.kernel * kernel, lines = s.batch * height;
  const int64_t many = std::max<int64_t>(1, kTaskPixels / width), parts = blocks_of(lines, many);
  const auto runs =
      columns_of(s.across.outputs, kernel, 1, [&](int64_t o, int64_t k) { return s.across.input_of(o, k); });
  const Tensor sums = at::zeros({parts, taps, channels}, x.options().dtype(statistics_type(x)));
  const int64_t blocks = blocks_of(channels, kTaskLanes);
  at::parallel_for(0, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> wide(width * kTaskLanes);
    std::vector<const S*> rows(kernel);
    std::vector<S*> to(kernel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, c = task % blocks * kTaskLanes,
                    lanes = std::min(kTaskLanes, channels - c),
                    step = std::is_same_v<T, S> ? channels : lanes;  // from one pixel of x to the next
      for (int64_t line = part * many; line < std::min(lines, (part + 1) * many); ++line) {
        const int64_t b = line / height, y = line % height;
        const T* from = x.const_data_ptr<T>() + line * width * channels + c;
        const S* row;
        if constexpr (std::is_same_v<T, S>) {
          row = from;
        } else {
          widen_pixels<T, S>(from, channels, width, lanes, wide.data());
          row = wide.data();
        }
        for (int64_t i = 0; i < s.down.kernel; ++i) {
          const int64_t oy = s.down.output_of(y, i);
          if (oy < 0) continue;
          const T* g = grad.const_data_ptr<T>() + (b * s.down.outputs + oy) * s.across.outputs * channels + c;
          for (const EqualColumns& run : runs) {
            int64_t met = 0;
            for (const auto& [j, at] : run.met) {
              rows[met] = row + at * step;
              to[met++] = sums.mutable_data_ptr<S>() + (part * taps + i * kernel + j) * channels + c;
            }
            add_products<T, S>(g + run.first * channels, channels,
                               {rows.data(), to.data(), met, s.across.stride * step}, run.count, lanes);
          }
        }
      }
    }
  });
  return sums.sum(0);
}

std::tuple<Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                int64_t stride, int64_t padding, int64_t dilation, bool for_x,
                                                bool for_weight) {
  const Shape s(x, weight, stride, padding, dilation);
  const Tensor rows = channel_rows(x), weights = weight_rows(weight, statistics_type(rows));
  const Tensor g = channel_rows(grad.to(rows.scalar_type()));
  const std::vector<int64_t> none{0};
  Tensor by_x = at::empty(for_x ? rows.sizes() : at::IntArrayRef(none), rows.options());
  Tensor by_weight = at::empty(none, weights.options());
  with_rows(rows, [&](auto element) {
    using T = decltype(element);
    if (for_x) {
      sum_pixels<T>(
          g, weights, nullptr, by_x, s, 1, stride,
          [&](int64_t i, int64_t k) { return s.down.output_of(i, k); },
          [&](int64_t i, int64_t k) { return s.across.output_of(i, k); });
    }
    if (for_weight) by_weight = sum_weights<T>(g, rows, s);
  });
  if (for_x) by_x = by_x.permute({0, 3, 1, 2});
  if (for_weight) by_weight = by_weight.t().contiguous().view(weight.sizes());
  return {by_x.to(x.scalar_type()), by_weight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("depthwise_conv2d_fwd.cpu", &depthwise_conv2d_fwd);
  m.impl("depthwise_conv2d_bwd.cpu", &depthwise_conv2d_bwd);
}

}  // namespace fastuda
