// category_pool: the softmax over the pixels is K rows of N, small compared with the features. These are read
// once, in tiles that are multiplied by it while they are in the cache.
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <torch/library.h>

#include "panel.h"
#include "tile.h"

namespace fastuda {

namespace {

constexpr int64_t kDeep = 128;    // pixels of a tile
constexpr int64_t kBlock = 1024;  // number of pixels whose exponentials are summed in their own type

// softmax(z) of every class of z [B, K, N] in place, from its log-sum-exp, which is computed if none is
// given. The log-sum-exp only keeps the exponentials in range: they are divided by their own sum, because its
// rounding is large for large logits.
template <class S>
void soft_max(const Tensor& z, S* lse, bool given) {
  const int64_t pixels = z.size(2);
  S* values = z.mutable_data_ptr<S>();
  at::parallel_for(0, z.size(0) * z.size(1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      S* row = values + plane * pixels;
      if (!given) lse[plane] = S(log_sum_exp(row, pixels, S(1)));
      double sum = 0;
      for (int64_t i = 0; i < pixels; i += kBlock) {
        sum += exp_row(row + i, std::min(kBlock, pixels - i), lse[plane], S(1), row + i);
      }
      scale_to(row, S(1 / sum), pixels, row);
    }
  });
}

// [B, N, K] -> new memory [B, K, N]
Tensor by_class(const Tensor& logits, at::ScalarType type) {
  return logits.transpose(1, 2).to(type).clone(at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> category_pool_fwd(const Tensor& features, const Tensor& logits) {
  const auto type = statistics_type(features);
  const Tensor x = readable(features), share = by_class(logits, type);
  const int64_t batch = x.size(0), pixels = x.size(1), width = x.size(2), classes = share.size(1);
  Tensor pooled = at::zeros({batch, classes, width}, share.options());
  Tensor lse = at::empty({batch, classes}, share.options());
  with_rows(x, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    soft_max(share, lse.mutable_data_ptr<S>(), false);
    const int64_t blocks = blocks_of(width, kCols);
    at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<S> tile(kDeep * kCols), weight(classes * kDeep);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, c0 = task % blocks * kCols, columns = std::min(kCols, width - c0);
        for (int64_t i0 = 0; i0 < pixels; i0 += kDeep) {
          const int64_t depth = std::min(kDeep, pixels - i0);
          const T* values = x.const_data_ptr<T>() + (b * pixels + i0) * width + c0;
          const S* right = tile.data();
          int64_t ld = columns;
          if constexpr (std::is_same_v<T, S>) {
            right = values, ld = width;
          } else {
            for (int64_t i = 0; i < depth; ++i) {
              load_row(values + i * width, columns, tile.data() + i * columns, static_cast<S*>(nullptr));
            }
          }
          for (int64_t k = 0; k < classes; ++k) {
            const S* from = share.const_data_ptr<S>() + (b * classes + k) * pixels + i0;
            std::copy(from, from + depth, weight.data() + k * kDeep);
          }
          plain_product(classes, columns, depth, weight.data(), kDeep, right, ld,
                        pooled.mutable_data_ptr<S>() + b * classes * width + c0, width, true);
        }
      }
      release_tiles<S>();
    });
  });
  return {pooled, lse};
}

// Both gradients for bf16 features, widened panel by panel: they never exist as a whole in float32.
void widening_backward(const Tensor& g, const Tensor& x, const Tensor& share, const Tensor& out,
                       const Tensor& features_grad, const Tensor& logits_grad, bool for_features,
                       bool for_logits) {
  using T = BFloat16;
  using S = acc_t<T>;
  const int64_t batch = x.size(0), pixels = x.size(1), width = x.size(2), classes = share.size(1);
  const int64_t panels = blocks_of(pixels, kRows), stride = padded(width);
  for (int64_t b = 0; b < batch; ++b) {
    const S *by = g.const_data_ptr<S>() + b * classes * width,
            *p = share.const_data_ptr<S>() + b * classes * pixels;
    const Packed<S> from_classes(classes, for_features ? width : 0),
        to_classes(width, for_logits ? classes : 0);
    if (for_features) pack_rows(by, width, nullptr, classes, width, from_classes);
    if (for_logits) pack_transposed(by, width, nullptr, classes, width, to_classes);
    std::vector<S> mean(classes);
    for (int64_t k = 0; k < classes; ++k) {
      mean[k] = inner(by + k * width, out.const_data_ptr<S>() + (b * classes + k) * width, width);
    }
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch<S> weight = panel_of<S>(classes), mixed = panel_of<S>(from_classes.columns);
      const Scratch<S> panel = panel_of<S>(for_logits ? stride : 0), slope = panel_of<S>(to_classes.columns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kRows, count = std::min(kRows, pixels - first);
        for (int64_t k = 0; k < classes; ++k) {
          for (int64_t r = 0; r < count; ++r) weight.data()[r * classes + k] = p[k * pixels + first + r];
        }
        if (for_features) {
          product(weight, classes, from_classes, mixed);
          for (int64_t r = 0; r < count; ++r) {
            scale_to(mixed.data() + r * from_classes.columns, S(1), width,
                     features_grad.mutable_data_ptr<T>() + (b * pixels + first + r) * width);
          }
        }
        if (!for_logits) continue;
        for (int64_t r = 0; r < count; ++r) {
          load_row(x.const_data_ptr<T>() + (b * pixels + first + r) * width, width, panel.data() + r * stride,
                   static_cast<S*>(nullptr));
        }
        product(panel, stride, to_classes, slope);
        for (int64_t r = 0; r < count; ++r) {
          S* to = logits_grad.mutable_data_ptr<S>() + (b * pixels + first + r) * classes;
          for (int64_t k = 0; k < classes; ++k) {
            to[k] = weight.data()[r * classes + k] * (slope.data()[r * to_classes.columns + k] - mean[k]);
          }
        }
      }
      release_tiles<S>();
    });
  }
}

std::tuple<Tensor, Tensor> category_pool_bwd(const Tensor& grad, const Tensor& features, const Tensor& logits,
                                             const Tensor& pooled, const Tensor& log_sum, bool for_features,
                                             bool for_logits) {
  const auto type = statistics_type(features);
  const Tensor x = readable(features), share = by_class(logits, type);
  const Tensor g = grad.to(type).contiguous(), out = pooled.contiguous(), lse = log_sum.clone();
  const std::vector<int64_t> none{0};
  Tensor features_grad = empty_result(for_features ? x.sizes() : at::IntArrayRef(none), x.options());
  Tensor logits_grad = at::empty(for_logits ? logits.sizes() : at::IntArrayRef(none), share.options());
  with_rows(x, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    soft_max(share, lse.mutable_data_ptr<S>(), true);
    if constexpr (!std::is_same_v<T, S>) {
      widening_backward(g, x, share, out, features_grad, logits_grad, for_features, for_logits);
      return;
    }
    // nothing to widen: the library's products are as fast
    if (for_features) at::bmm_out(features_grad, share.transpose(1, 2), g);
    if (for_logits) {
      at::bmm_out(logits_grad, x, g.transpose(1, 2));
      logits_grad.sub_((g * out).sum(2).unsqueeze(1)).mul_(share.transpose(1, 2));
    }
  });
  return {features_grad.to(features.scalar_type()), logits_grad.to(logits.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("category_pool_fwd.cpu", &category_pool_fwd);
  m.impl("category_pool_bwd.cpu", &category_pool_bwd);
}

}  // namespace fastuda
