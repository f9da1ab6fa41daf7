// local_affinity reads probabilities once per direction, from rows that are in the cache, and writes only the
// result; the backward recomputes the terms. Planes are independent, so the order of sums does not depend on
// the number of threads.
#include "local_affinity.h"

#include <torch/library.h>

#include "../tensors.h"
#include "scratch.h"

namespace fastuda {

namespace {

struct Offset {
  int64_t y, x;
};

std::vector<Offset> offsets(int64_t neighbours, int64_t distance) {
  std::vector<Offset> all;
  for (int64_t y = -1; y <= 1; ++y) {
    for (int64_t x = -1; x <= 1; ++x) {
      if ((y || x) && (neighbours == 8 || y * x == 0)) all.push_back({y * distance, x * distance});
    }
  }
  return all;
}

// A plane with its left and right border repeated `pad` times; row() clamps rows above and below.
template <class S>
class Padded {
 public:
  Padded(int64_t height, int64_t width, int64_t pad)
      : height_(height), width_(width), stride_(width + 2 * pad), pad_(pad), values_(height * stride_) {}
  void load(const S* plane) {
    for (int64_t y = 0; y < height_; ++y) {
      S* to = values_.data() + y * stride_;
      const S* from = plane + y * width_;
      std::fill(to, to + pad_, from[0]);
      std::copy(from, from + width_, to + pad_);
      std::fill(to + pad_ + width_, to + stride_, from[width_ - 1]);
    }
  }
  S* row(int64_t y, int64_t x = 0) {
    return values_.data() + std::clamp<int64_t>(y, 0, height_ - 1) * stride_ + pad_ + x;
  }

 protected:
  int64_t height_, width_, stride_, pad_;
  std::vector<S> values_;
};

// A padded plane with the logarithms of its rows, which are computed when they are needed, while the rows are
// in the cache.
template <class S>
class PaddedLogs {
 public:
  PaddedLogs(int64_t height, int64_t width, int64_t pad)
      : height_(height),
        width_(width),
        stride_(width + 2 * pad),
        pad_(pad),
        plane_(height, width, pad),
        log_one_(height, width, pad),
        log_zero_(width) {}
  void load(const S* plane) {
    plane_.load(plane);
    known_ = 0;
  }
  // Row y and the row at offset o; y must not decrease between two loads.
  NeighbourRow<S> pair(int64_t y, Offset o) {
    return {width_,          plane_.row(y),    plane_.row(y + o.y, o.x),
            log_one_.row(y), log_zero_.data(), log_one_.row(y + o.y, o.x)};
  }
  void reach(int64_t y) {
    for (const int64_t last = std::min(y + pad_, height_ - 1); known_ <= last; ++known_) {
      affinity_log_one(plane_.row(known_, -pad_), stride_, log_one_.row(known_, -pad_));
    }
    affinity_log_zero(plane_.row(y), width_, log_zero_.data());
  }

 private:
  int64_t height_, width_, stride_, pad_, known_ = 0;
  Padded<S> plane_, log_one_;
  std::vector<S> log_zero_;
};

// Gradients of a padded plane; fold() adds the gradients of the repeated borders to the border itself.
template <class S>
class PaddedSum : public Padded<S> {
 public:
  using Padded<S>::Padded;
  void fold(S* out) {
    const int64_t width = this->width_;
    for (int64_t y = 0; y < this->height_; ++y) {
      S* from = this->row(y);
      for (int64_t x = 1; x <= this->pad_; ++x) {
        from[0] += from[-x];
        from[width - 1] += from[width - 1 + x];
      }
      std::copy(from, from + width, out + y * width);
    }
  }
};

template <class F>
void for_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

Tensor local_affinity_fwd(const Tensor& probabilities, int64_t neighbours, int64_t distance, bool product) {
  const Tensor p = probabilities.to(statistics_type(probabilities)).contiguous();
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const std::vector<Offset> around = offsets(neighbours, distance);
  const int64_t directions = int64_t(around.size()), plane = height * width;
  Tensor out = product ? at::zeros({batch, directions, height, width}, p.options())
                       : empty_result({batch, directions * classes, height, width}, p.options());
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S* from = p.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    if (product) {
      at::parallel_for(0, batch * directions, 1, [&](int64_t begin, int64_t end) {
        Padded<S> padded(height, width, distance);
        for (int64_t task = begin; task < end; ++task) {
          const Offset o = around[task % directions];
          for (int64_t k = 0; k < classes; ++k) {
            padded.load(from + (task / directions * classes + k) * plane);
            for (int64_t y = 0; y < height; ++y) {
              product_row(padded.row(y), padded.row(y + o.y, o.x), width, to + task * plane + y * width);
            }
          }
        }
      });
      return;
    }
    at::parallel_for(0, batch * classes, 1, [&](int64_t begin, int64_t end) {
      PaddedLogs<S> padded(height, width, distance);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / classes, k = task % classes;
        padded.load(from + task * plane);
        for (int64_t y = 0; y < height; ++y) {
          padded.reach(y);
          for (int64_t d = 0; d < directions; ++d) {
            affinity_row(padded.pair(y, around[d]),
                         to + ((b * directions + d) * classes + k) * plane + y * width);
          }
        }
      }
    });
  });
  return out;
}

Tensor local_affinity_bwd(const Tensor& grad, const Tensor& probabilities, int64_t neighbours,
                          int64_t distance, bool product) {
  const auto type = statistics_type(probabilities);
  const Tensor p = probabilities.to(type).contiguous(), g = grad.to(type).contiguous();
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const std::vector<Offset> around = offsets(neighbours, distance);
  const int64_t directions = int64_t(around.size()), plane = height * width;
  Tensor out = empty_result(p.sizes(), p.options());
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S *from = p.const_data_ptr<S>(), *by = g.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    at::parallel_for(0, batch * classes, 1, [&](int64_t begin, int64_t end) {
      PaddedLogs<S> padded(height, width, distance);
      std::vector<S> aside(width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / classes, k = task % classes;
        padded.load(from + task * plane);
        PaddedSum<S> sum(height, width, distance);
        for (int64_t y = 0; y < height; ++y) {
          if (!product) padded.reach(y);
          for (int64_t d = 0; d < directions; ++d) {
            const Offset o = around[d];
            const NeighbourRow<S> row = padded.pair(y, o);
            std::fill(aside.begin(), aside.end(), S(0));
            const int64_t at = product ? b * directions + d : (b * directions + d) * classes + k;
            const S* weight = by + at * plane + y * width;
            if (product) {
              product_gradient_row(row.own, row.other, weight, width, sum.row(y), aside.data());
            } else {
              affinity_gradient_row(row, weight, sum.row(y), aside.data());
            }
            S* place = sum.row(y + o.y, o.x);
            for (int64_t x = 0; x < width; ++x) place[x] += aside[x];
          }
        }
        sum.fold(to + task * plane);
      }
    });
  });
  return out.to(probabilities.scalar_type());
}

// The sum over pixels and neighbours of the inner products, and its gradient; no plane of products is stored.
std::tuple<Tensor, Tensor> affinity_cleaning_loss_fwd(const Tensor& probabilities, int64_t neighbours,
                                                      bool gradient) {
  const Tensor p = probabilities.to(statistics_type(probabilities)).contiguous();
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const std::vector<Offset> around = offsets(neighbours, 1);
  const int64_t plane = height * width;
  Tensor grad = empty_result(gradient ? p.sizes() : at::IntArrayRef({0}), p.options());
  std::vector<double> sums(batch * classes, 0);
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S* from = p.const_data_ptr<S>();
    S* to = gradient ? grad.mutable_data_ptr<S>() : nullptr;
    at::parallel_for(0, batch * classes, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> total(width), ones(width, S(1)), aside(width);
      Padded<S> padded(height, width, 1);
      for (int64_t task = begin; task < end; ++task) {
        padded.load(from + task * plane);
        PaddedSum<S> sum(gradient ? height : 0, gradient ? width : 0, gradient ? 1 : 0);
        for (int64_t y = 0; y < height; ++y) {
          std::fill(total.begin(), total.end(), S(0));
          for (const Offset o : around) {
            const S *own = padded.row(y), *other = padded.row(y + o.y, o.x);
            product_row(own, other, width, total.data());
            if (!gradient) continue;
            std::fill(aside.begin(), aside.end(), S(0));
            product_gradient_row(own, other, ones.data(), width, sum.row(y), aside.data());
            S* place = sum.row(y + o.y, o.x);
            for (int64_t x = 0; x < width; ++x) place[x] += aside[x];
          }
          for (const S value : total) sums[task] += value;
        }
        if (gradient) sum.fold(to + task * plane);
      }
    });
  });
  double all = 0;
  for (const double value : sums) all += value;
  return {scalar_result(all, p), grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("local_affinity_fwd.cpu", &local_affinity_fwd);
  m.impl("local_affinity_bwd.cpu", &local_affinity_bwd);
  m.impl("affinity_cleaning_loss_fwd.cpu", &affinity_cleaning_loss_fwd);
}

}  // namespace fastuda
