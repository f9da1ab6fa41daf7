// prototype_contrast reads a panel of rows once and multiplies it by all prototypes in one product; for the
// logits of DistCL, q mu / tau + q^2 s / (2 tau^2), the product has width 2 A. The variance term of the own
// class enters the loss twice with opposite signs, so a row's loss is the log-sum-exp minus q mu_y / tau.
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "panel.h"
#include "tile.h"
#include "widen.h"

namespace fastuda {

namespace {

// scale (by_mean + x by_spread), or scale by_mean without the spread.
template <class T, class S>
FASTUDA_INLINE void store_body(const S* by_mean, const T* x, const S* by_spread, S scale, int64_t n, T* out) {
  if (by_spread) {
#pragma omp simd
    for (int64_t a = 0; a < n; ++a) narrow(scale * (by_mean[a] + S(widen(x[a])) * by_spread[a]), out + a);
  } else {
#pragma omp simd
    for (int64_t a = 0; a < n; ++a) narrow(scale * by_mean[a], out + a);
  }
}

// out = softmax(z); returns the log-sum-exp.
template <class S>
FASTUDA_INLINE S softmax_body(const S* z, int64_t n, S* out) {
  S best = z[0], sum = 0;
#pragma omp simd reduction(max : best)
  for (int64_t k = 0; k < n; ++k) best = z[k] > best ? z[k] : best;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    out[k] = fast_exp(z[k] - best);
    sum += out[k];
  }
  const S share = 1 / sum;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] *= share;
  return best + std::log(sum);
}

// Mean over n positives z of log(1 + exp(other - z)); replaces z by its slopes. Also returns the slope of
// `other`.
template <class S>
FASTUDA_INLINE S bank_body(S* z, int64_t n, S other, S* slope_of_other) {
  S loss = 0, slope = 0;
  const S share = S(1) / S(n);
#pragma omp simd reduction(+ : loss, slope)
  for (int64_t m = 0; m < n; ++m) {
    const S gap = other - z[m], e = fast_exp(gap > 0 ? -gap : gap), near = 1 / (1 + e);
    loss += (gap > 0 ? gap : S(0)) + fast_log(1 + e);
    const S s = share * (gap > 0 ? near : e * near);
    z[m] = -s;
    slope += s;
  }
  *slope_of_other = slope;
  return share * loss;
}

// target_clones does not apply to templates.
#define CONTRAST_STORE(T, S, CLONES)                                                                \
  CLONES void store(const S* by_mean, const T* x, const S* by_spread, S scale, int64_t n, T* out) { \
    store_body(by_mean, x, by_spread, scale, n, out);                                               \
  }
#define CONTRAST_ROWS(S, CLONES)                                                      \
  CLONES S softmax(const S* z, int64_t n, S* out) { return softmax_body(z, n, out); } \
  CLONES S bank_loss(S* z, int64_t n, S other, S* slope) { return bank_body(z, n, other, slope); }
CONTRAST_STORE(float, float, FASTUDA_CLONES)
CONTRAST_STORE(BFloat16, float, FASTUDA_CLONES)
CONTRAST_STORE(double, double, )
CONTRAST_ROWS(float, FASTUDA_CLONES)
CONTRAST_ROWS(double, )
#undef CONTRAST_STORE
#undef CONTRAST_ROWS

enum class Kind { kOwn, kIgnored, kAlien };
Kind kind_of(int64_t label, int64_t ignore, int64_t classes) {
  if (label == ignore) return Kind::kIgnored;
  return label < 0 || label >= classes ? Kind::kAlien : Kind::kOwn;
}
void check_labels(bool alien, int64_t classes) {
  TORCH_CHECK_VALUE(!alien, "labels hold classes outside 0..", classes - 1, " other than ignore_index");
}

std::tuple<Tensor, Tensor> prototype_contrast_fwd(const Tensor& features, const Tensor& labels,
                                                  const Tensor& mean, const std::optional<Tensor>& variance,
                                                  double tau, int64_t ignore_index) {
  const auto type = statistics_type(features);
  const Tensor x = readable(features), y = labels.to(at::kLong).contiguous();
  const Tensor centre = mean.to(type).div(tau).contiguous();
  const Tensor weight =
      variance ? at::cat({centre, variance->to(type).div(2 * tau * tau)}, 1).contiguous() : centre;
  const int64_t rows = x.size(0), width = x.size(1), classes = centre.size(0), depth = weight.size(1);
  const int64_t panels = blocks_of(rows, kRows), stride = padded(depth);
  Tensor share = at::zeros({rows, classes}, centre.options());
  std::vector<double> losses(panels, 0);
  std::atomic<bool> alien{false};
  with_rows(x, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Packed<S> packed(depth, classes);
    pack_transposed(weight.const_data_ptr<S>(), depth, nullptr, classes, depth, packed);
    const int64_t* label = y.const_data_ptr<int64_t>();
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch<S> panel = panel_of<S>(stride), logits = panel_of<S>(packed.columns);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kRows, count = std::min(kRows, rows - first);
        for (int64_t r = 0; r < count; ++r) {
          S* to = panel.data() + r * stride;
          load_row(x.const_data_ptr<T>() + (first + r) * width, width, to, variance ? to + width : nullptr);
        }
        product(panel, stride, packed, logits);
        for (int64_t r = 0; r < count; ++r) {
          const Kind kind = kind_of(label[first + r], ignore_index, classes);
          if (kind == Kind::kAlien) alien = true;
          if (kind != Kind::kOwn) continue;
          const S lse = softmax(logits.data() + r * packed.columns, classes,
                                share.mutable_data_ptr<S>() + (first + r) * classes);
          const S* own = centre.const_data_ptr<S>() + label[first + r] * width;
          losses[p] += lse - inner(panel.data() + r * stride, own, width);
        }
      }
      release_tiles<S>();
    });
  });
  check_labels(alien, classes);
  double loss = 0;
  for (const double part : losses) loss += part;
  return {scalar_result(loss, centre), share};
}

Tensor prototype_contrast_bwd(const Tensor& grad, const Tensor& features, const Tensor& labels,
                              const Tensor& share, const Tensor& mean, const std::optional<Tensor>& variance,
                              double tau, int64_t ignore_index) {
  const auto type = statistics_type(features);
  const Tensor x = readable(features), y = labels.to(at::kLong).contiguous(), shares = share.contiguous();
  const Tensor centre = mean.to(type).div(tau).contiguous();
  const Tensor spread = variance ? variance->to(type).div(tau * tau).contiguous() : Tensor();
  const int64_t rows = x.size(0), width = x.size(1), classes = centre.size(0);
  const double scale = grad.item().toDouble();
  Tensor out = empty_result(x.sizes(), x.options());
  with_rows(x, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Packed<S> by_mean(classes, width), by_spread(variance ? classes : 0, variance ? width : 0);
    pack_rows(centre.const_data_ptr<S>(), width, nullptr, classes, width, by_mean);
    if (variance) pack_rows(spread.const_data_ptr<S>(), width, nullptr, classes, width, by_spread);
    const int64_t* label = y.const_data_ptr<int64_t>();
    at::parallel_for(0, blocks_of(rows, kRows), 1, [&](int64_t begin, int64_t end) {
      const Scratch<S> weight = panel_of<S>(classes), slope = panel_of<S>(classes);
      const Scratch<S> means = panel_of<S>(by_mean.columns), spreads = panel_of<S>(by_spread.columns);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kRows, count = std::min(kRows, rows - first);
        const S* from = shares.const_data_ptr<S>() + first * classes;
        std::copy(from, from + count * classes, weight.data());
        std::copy(from, from + count * classes, slope.data());
        const auto own = [&](int64_t r) {
          return kind_of(label[first + r], ignore_index, classes) == Kind::kOwn;
        };
        for (int64_t r = 0; r < count; ++r) {
          if (own(r)) slope.data()[r * classes + label[first + r]] -= 1;
        }
        product(slope, classes, by_mean, means);
        if (variance) product(weight, classes, by_spread, spreads);
        for (int64_t r = 0; r < count; ++r) {
          T* to = out.mutable_data_ptr<T>() + (first + r) * width;
          if (!own(r)) {
            std::fill(to, to + width, T(0));
            continue;
          }
          store(means.data() + r * by_mean.columns, x.const_data_ptr<T>() + (first + r) * width,
                variance ? spreads.data() + r * by_spread.columns : nullptr, S(scale), width, to);
        }
      }
      release_tiles<S>();
    });
  });
  return out.to(features.scalar_type());
}

// BankCL takes the rows class by class, because rows of one class use the same bank.
std::tuple<Tensor, Tensor> prototype_contrast_bank_fwd(const Tensor& features, const Tensor& labels,
                                                       const Tensor& vectors, const Tensor& count, double tau,
                                                       int64_t ignore_index, bool gradient) {
  const auto type = statistics_type(features);
  const Tensor x = readable(features), y = labels.to(at::kLong).contiguous();
  const Tensor bank = vectors.to(type).div(tau).contiguous(), filled = count.to(at::kLong).contiguous();
  const int64_t rows = x.size(0), width = x.size(1), classes = bank.size(0), length = bank.size(1);
  const int64_t stride = padded(width);
  Tensor grad = gradient ? at::zeros({rows, width}, bank.options()) : at::empty({0}, bank.options());
  std::vector<std::vector<int64_t>> members(classes);
  bool alien = false;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = y.const_data_ptr<int64_t>()[i];
    const Kind kind = kind_of(label, ignore_index, classes);
    if (kind == Kind::kOwn) members[label].push_back(i);
    alien |= kind == Kind::kAlien;
  }
  check_labels(alien, classes);
  double loss = 0;
  with_rows(x, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    std::vector<S> centres(classes * width, S(0));
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t taken = std::min(filled.const_data_ptr<int64_t>()[c], length);
      for (int64_t m = 0; m < taken; ++m) {
        const S* from = bank.const_data_ptr<S>() + (c * length + m) * width;
        for (int64_t a = 0; a < width; ++a) centres[c * width + a] += from[a] / S(taken);
      }
    }
    const Packed<S> to_centres(width, classes), from_centres(classes, width);
    pack_transposed(centres.data(), width, nullptr, classes, width, to_centres);
    if (gradient) pack_rows(centres.data(), width, nullptr, classes, width, from_centres);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t taken = std::min(filled.const_data_ptr<int64_t>()[c], length);
      const std::vector<int64_t>& member = members[c];
      const int64_t panels = blocks_of(int64_t(member.size()), kRows);
      if (taken < 1 || panels < 1) continue;
      const S* own = bank.const_data_ptr<S>() + c * length * width;
      const Packed<S> to_bank(width, taken),
          from_bank(taken, width, 16);  // few different depths, because brgemm keeps code for each
      pack_transposed(own, width, nullptr, taken, width, to_bank);
      if (gradient) pack_rows(own, width, nullptr, taken, width, from_bank);
      std::vector<double> losses(panels, 0);
      at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        const Scratch<S> panel = panel_of<S>(stride), positive = panel_of<S>(to_bank.columns),
                         other = panel_of<S>(to_centres.columns), by_bank = panel_of<S>(from_bank.columns),
                         by_centres = panel_of<S>(from_bank.columns);
        for (int64_t p = begin; p < end; ++p) {
          const int64_t first = p * kRows, here = std::min(kRows, int64_t(member.size()) - first);
          for (int64_t r = 0; r < here; ++r) {
            load_row(x.const_data_ptr<T>() + member[first + r] * width, width, panel.data() + r * stride,
                     static_cast<S*>(nullptr));
          }
          product(panel, stride, to_bank, positive);
          product(panel, stride, to_centres, other);
          for (int64_t r = 0; r < here; ++r) {
            S *z = other.data() + r * to_centres.columns, slope;
            z[c] = -std::numeric_limits<S>::infinity();
            const S negative = classes > 1 ? softmax(z, classes, z) : z[c];
            losses[p] += bank_loss(positive.data() + r * to_bank.columns, taken, negative, &slope);
            for (int64_t k = 0; k < classes; ++k) z[k] = k == c ? S(0) : z[k] * slope;
          }
          if (!gradient) continue;
          product(positive, to_bank.columns, from_bank, by_bank);
          product(other, to_centres.columns, from_centres, by_centres);
          for (int64_t r = 0; r < here; ++r) {
            S* to = grad.mutable_data_ptr<S>() + member[first + r] * width;
            const S *one = by_bank.data() + r * from_bank.columns,
                    *two = by_centres.data() + r * from_bank.columns;
            for (int64_t a = 0; a < width; ++a) to[a] = one[a] + two[a];
          }
        }
        release_tiles<S>();
      });
      for (const double part : losses) loss += part;
    }
  });
  return {scalar_result(loss, bank), grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("prototype_contrast_fwd.cpu", &prototype_contrast_fwd);
  m.impl("prototype_contrast_bwd.cpu", &prototype_contrast_bwd);
  m.impl("prototype_contrast_bank_fwd.cpu", &prototype_contrast_bank_fwd);
}

}  // namespace fastuda
