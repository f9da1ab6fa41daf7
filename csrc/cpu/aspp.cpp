// aspp: every tap of every branch is a product with the same features, [taps K, C] . [C, pixels]; the logits
// are sums of its rows, each shifted by its tap. The backward gathers the rows from the gradient; two
// products with them give both gradients.
#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <map>

#include "panel.h"
#include "widen.h"

namespace fastuda {

namespace {

constexpr int64_t kPixels = 4096;  // largest panel, so that its products stay in the cache
constexpr int64_t kFewest = 192;   // smaller panels are not worth their own products

// out[y, x] takes the product with the features at (y + dy, x + dx).
struct Tap {
  int64_t dy, dx;
};

// The taps that reach into an image of h x w, sorted by dy; taps with the same shift are merged.
struct Taps {
  std::vector<Tap> shifts;
  std::vector<int64_t> slot;  // of branch r and kernel position (i, j): its tap, or -1

  Taps(at::IntArrayRef dilations, int64_t h, int64_t w) {
    std::map<std::pair<int64_t, int64_t>, int64_t> order;
    const auto each = [&](const auto& f) {
      for (const int64_t d : dilations) {
        for (int64_t i = -1; i <= 1; ++i) {
          for (int64_t j = -1; j <= 1; ++j) f(std::make_pair(i * d, j * d));
        }
      }
    };
    each([&](const auto& at) {
      if (std::abs(at.first) < h && std::abs(at.second) < w) order[at] = 0;
    });
    for (auto& [at, index] : order) {
      index = int64_t(shifts.size());
      shifts.push_back({at.first, at.second});
    }
    each([&](const auto& at) { slot.push_back(order.count(at) ? order[at] : -1); });
  }
  int64_t size() const { return int64_t(shifts.size()); }

  // weight [branches, 3, 3, K, C] -> [taps, K, C]
  Tensor gathered(const Tensor& weight, at::ScalarType type) const {
    const int64_t classes = weight.size(3), width = weight.size(4);
    const Tensor flat = weight.to(type).contiguous().view({-1, classes, width});
    Tensor out = at::zeros({size(), classes, width}, flat.options());
    for (size_t p = 0; p < slot.size(); ++p) {
      if (slot[p] >= 0) out.select(0, slot[p]).add_(flat.select(0, int64_t(p)));
    }
    return out;
  }

  // the reverse: [taps, K, C] -> weight [branches, 3, 3, K, C]
  Tensor scattered(const Tensor& taps, at::IntArrayRef sizes) const {
    Tensor out = at::empty(sizes, taps.options());
    const Tensor flat = out.view({-1, sizes[3], sizes[4]});
    for (size_t p = 0; p < slot.size(); ++p) {
      const Tensor to = flat.select(0, int64_t(p));
      slot[p] < 0 ? to.zero_() : to.copy_(taps.select(0, slot[p]));
    }
    return out;
  }
};

// Rows [top, bottom) of an image, and the taps [first, last) that move some of them to outputs inside it.
struct Panel {
  int64_t top, bottom, first, last;
};

// The set of taps that stay inside the image changes at few rows; panels end there and use only their taps.
std::vector<Panel> panels_of(const Taps& taps, int64_t h, int64_t w) {
  std::vector<int64_t> cuts{0, h};
  for (const Tap& tap : taps.shifts) cuts.push_back(tap.dy > 0 ? tap.dy : h + tap.dy);
  std::sort(cuts.begin(), cuts.end());
  std::vector<Panel> panels;
  for (int64_t top = 0; top < h;) {
    int64_t bottom = *std::upper_bound(cuts.begin(), cuts.end(), top);
    while (bottom < h && (bottom - top) * w < kFewest) {
      bottom = *std::upper_bound(cuts.begin(), cuts.end(), bottom);
    }
    bottom = std::min(bottom, top + std::max<int64_t>(kPixels / w, 1));
    const auto from = std::partition_point(taps.shifts.begin(), taps.shifts.end(),
                                           [&](const Tap& tap) { return tap.dy <= top - h; });
    const auto to = std::partition_point(taps.shifts.begin(), taps.shifts.end(),
                                         [&](const Tap& tap) { return tap.dy < bottom; });
    panels.push_back({top, bottom, from - taps.shifts.begin(), to - taps.shifts.begin()});
    top = bottom;
  }
  return panels;
}

template <class T, class S>
FASTUDA_INLINE void add_body(const T* from, int64_t n, S* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += widen(from[j]);
}
FASTUDA_CLONES void add_row(const float* from, int64_t n, float* to) { add_body(from, n, to); }
FASTUDA_CLONES void add_row(const BFloat16* from, int64_t n, float* to) { add_body(from, n, to); }
void add_row(const double* from, int64_t n, double* to) { add_body(from, n, to); }

// Calls f(row of the panel, row of the output, first pixel of a row, first of its output, pixels) for what a
// tap moves within an image of h x w.
template <class F>
void each_run(const Panel& panel, const Tap& tap, int64_t h, int64_t w, const F& f) {
  const int64_t from = std::max<int64_t>(0, tap.dx), count = w - std::abs(tap.dx);
  for (int64_t r = std::max(panel.top, tap.dy); r < std::min(panel.bottom, h + tap.dy); ++r) {
    f(r - panel.top, r - tap.dy, from, from - tap.dx, count);
  }
}

// The type of the features if the machine multiplies it, otherwise the type that they are widened to.
at::ScalarType product_type(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && !has_bf16_gemm() ? at::kFloat : x.scalar_type();
}

// [B, C, h, w] -> [B, h w, C]
Tensor pixel_rows(const Tensor& features) { return channel_rows(features).flatten(1, 2); }

Tensor aspp_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                at::IntArrayRef dilations) {
  const Tensor x = pixel_rows(features);
  const int64_t h = features.size(2), w = features.size(3), classes = weight.size(3), width = x.size(2);
  const Taps taps(dilations, h, w);
  const auto panels = panels_of(taps, h, w);
  const auto type = product_type(x);
  const Tensor a = taps.gathered(weight, type).view({-1, width});
  Tensor sums = at::zeros({x.size(0), classes, h, w}, x.options().dtype(statistics_type(x)));
  if (bias) sums.add_(bias->view({-1, 1, 1}));
  int64_t room = 0;
  for (const Panel& p : panels) {
    room = std::max(room, (p.last - p.first) * classes * (p.bottom - p.top) * w);
  }
  const Tensor memory = at::empty({room}, a.options());
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (const Panel& panel : panels) {
      const int64_t pixels = (panel.bottom - panel.top) * w, count = (panel.last - panel.first) * classes;
      const Tensor rows = x.select(0, b).narrow(0, panel.top * w, pixels).to(type);
      Tensor products = memory.narrow(0, 0, count * pixels).view({count, pixels});
      at::mm_out(products, a.narrow(0, panel.first * classes, count), rows.t());
      with_rows(products, [&](auto element) {
        using T = decltype(element);
        at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) {
            acc_t<T>* plane = sums.mutable_data_ptr<acc_t<T>>() + (b * classes + k) * h * w;
            for (int64_t t = panel.first; t < panel.last; ++t) {
              const T* from = products.const_data_ptr<T>() + ((t - panel.first) * classes + k) * pixels;
              each_run(panel, taps.shifts[t], h, w,
                       [&](int64_t r, int64_t y, int64_t at, int64_t to, int64_t n) {
                         add_row(from + r * w + at, n, plane + y * w + to);
                       });
            }
          }
        });
      });
    }
  }
  return sums.to(features.scalar_type()).contiguous(features.suggest_memory_format());
}

std::tuple<Tensor, Tensor> aspp_bwd(const Tensor& grad, const Tensor& features, const Tensor& weight,
                                    at::IntArrayRef dilations, bool for_features, bool for_weight) {
  const Tensor x = pixel_rows(features);
  const int64_t h = features.size(2), w = features.size(3), classes = weight.size(3), width = x.size(2);
  const Taps taps(dilations, h, w);
  const auto panels = panels_of(taps, h, w);
  const auto type = product_type(x);
  const Tensor a = taps.gathered(weight, type).view({-1, width}), g = grad.to(type).contiguous();
  const std::vector<int64_t> none{0};
  Tensor by_x = empty_result(for_features ? x.sizes() : at::IntArrayRef(none), x.options());
  Tensor by_a =
      at::zeros(for_weight ? a.sizes() : at::IntArrayRef(none), a.options().dtype(statistics_type(x)));
  int64_t room = 0;
  for (const Panel& p : panels) {
    room = std::max(room, (p.last - p.first) * classes * (p.bottom - p.top) * w);
  }
  const Tensor memory = at::empty({room}, a.options());
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (const Panel& panel : panels) {
      const int64_t pixels = (panel.bottom - panel.top) * w, first = panel.first * classes;
      const int64_t count = panel.last * classes - first;
      const Tensor moved = memory.narrow(0, 0, count * pixels).view({count, pixels});
      with_rows(moved, [&](auto element) {
        using T = decltype(element);
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const T* plane = g.const_data_ptr<T>() + (b * classes + row % classes) * h * w;
            T* to = moved.mutable_data_ptr<T>() + row * pixels;
            std::fill(to, to + pixels, T(0));
            each_run(panel, taps.shifts[panel.first + row / classes], h, w,
                     [&](int64_t r, int64_t y, int64_t at, int64_t from, int64_t n) {
                       std::copy_n(plane + y * w + from, n, to + r * w + at);
                     });
          }
        });
      });
      const Tensor these = a.narrow(0, first, count);
      if (for_features) {
        Tensor to = by_x.select(0, b).narrow(0, panel.top * w, pixels);
        to.scalar_type() == type ? at::mm_out(to, moved.t(), these) : to.copy_(at::mm(moved.t(), these));
      }
      if (for_weight) {
        const Tensor rows = x.select(0, b).narrow(0, panel.top * w, pixels).to(type);
        Tensor to = by_a.narrow(0, first, count);
        to.scalar_type() == type ? to.addmm_(moved, rows) : to.add_(at::mm(moved, rows));
      }
    }
  }
  if (for_features) by_x = by_x.view({x.size(0), h, w, width}).permute({0, 3, 1, 2});
  if (for_weight) by_a = taps.scattered(by_a.view({-1, classes, width}), weight.sizes());
  return {by_x.to(features.scalar_type()), by_a.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("aspp_fwd.cpu", &aspp_fwd);
  m.impl("aspp_bwd.cpu", &aspp_bwd);
}

}  // namespace fastuda
