// local_affinity reads probabilities once per direction, from rows that are in the cache, and writes only the
// result; the backward recomputes the terms. Maps are channels-last, as a convolution reads them: a row of
// all of them is computed plane by plane in the cache, then transposed. Blocks of rows have a fixed height,
// so the order of sums does not depend on the number of threads.
#include "local_affinity.h"

#include <torch/library.h>

#include "../tensors.h"
#include "padded_rows.h"
#include "scratch.h"

namespace fastuda {

namespace {

std::vector<Offset> offsets(int64_t neighbours, int64_t distance) {
  std::vector<Offset> all;
  for (int64_t y = -1; y <= 1; ++y) {
    for (int64_t x = -1; x <= 1; ++x) {
      if ((y || x) && (neighbours == 8 || y * x == 0)) all.push_back({y * distance, x * distance});
    }
  }
  return all;
}

template <class F>
void for_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

Tensor inner_products(const Tensor& p, const std::vector<Offset>& around, int64_t distance) {
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const int64_t directions = int64_t(around.size()), plane = height * width;
  const Tensor out = at::zeros({batch, directions, height, width}, p.options());
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S* from = p.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    at::parallel_for(0, batch * directions, 1, [&](int64_t begin, int64_t end) {
      Padded<S> padded(height, width, distance, height);
      for (int64_t task = begin; task < end; ++task) {
        const Offset o = around[task % directions];
        for (int64_t k = 0; k < classes; ++k) {
          padded.load(from + (task / directions * classes + k) * plane, {0, height});
          for (int64_t y = 0; y < height; ++y) {
            product_row(padded.row(y), padded.row(y + o.y, o.x), width, to + task * plane + y * width);
          }
        }
      }
    });
  });
  return out;
}

// Elements from one plane of a row to the next: not a power of two, which would fall into few cache sets.
int64_t plane_step(int64_t width) { return round_up(width, 16) + 16; }

Tensor local_affinity_fwd(const Tensor& probabilities, int64_t neighbours, int64_t distance, bool product) {
  const Tensor p = probabilities.to(statistics_type(probabilities)).contiguous();
  const std::vector<Offset> around = offsets(neighbours, distance);
  if (product) return inner_products(p, around, distance);
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const int64_t maps = int64_t(around.size()) * classes, plane = height * width, step = plane_step(width);
  const Blocks blocks(height, distance);
  const Tensor out =
      empty_result({batch, maps, height, width}, p.options().memory_format(at::MemoryFormat::ChannelsLast));
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S* from = p.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    at::parallel_for(0, batch * blocks.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<PaddedLogs<S>> padded(classes, {height, width, distance, blocks.most_rows()});
      std::vector<S> row(maps * step);  // [maps, step]
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks.count, block = task % blocks.count;
        for (int64_t k = 0; k < classes; ++k) {
          padded[k].load(from + (b * classes + k) * plane, blocks.around(block));
        }
        for (int64_t y = blocks.own(block).first; y < blocks.own(block).last; ++y) {
          for (int64_t k = 0; k < classes; ++k) {
            padded[k].reach(y);
            S* map = row.data() + k * step;
            for (const Offset o : around) {
              affinity_row(padded[k].pair(y, o), map);
              map += classes * step;
            }
          }
          transpose_rows(row.data(), step, maps, width, to + (b * plane + y * width) * maps, maps);
        }
      }
    });
  });
  return out;
}

// Adds the gradients of rows that a block's rows have as neighbours to the next blocks; the sums of every
// block are added in a fixed order. lent [blocks, 2, distance, classes, width]: above, and below.
template <class S>
void add_lent(const S* lent, const Blocks& blocks, int64_t classes, int64_t width, S* out, int64_t images) {
  const int64_t row = classes * width, side = blocks.distance * row;
  at::parallel_for(0, images * blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks.count, block = task % blocks.count;
      const Rows own = blocks.own(block);
      const auto add = [&](int64_t first, int64_t last, const S* rows) {
        for (int64_t y = first; y < last; ++y, rows += row) {
          for (int64_t k = 0; k < classes; ++k) {
            S* to = out + ((b * classes + k) * blocks.height + y) * width;
            for (int64_t x = 0; x < width; ++x) to[x] += rows[k * width + x];
          }
        }
      };
      if (block > 0) add(own.first, blocks.around(block - 1).last, lent + ((task - 1) * 2 + 1) * side);
      if (block + 1 < blocks.count) add(own.last - blocks.distance, own.last, lent + (task + 1) * 2 * side);
    }
  });
}

Tensor local_affinity_bwd(const Tensor& grad, const Tensor& probabilities, int64_t neighbours,
                          int64_t distance, bool product) {
  const auto type = statistics_type(probabilities);
  const Tensor p = probabilities.to(type).contiguous();
  const int64_t batch = p.size(0), classes = p.size(1), height = p.size(2), width = p.size(3);
  const std::vector<Offset> around = offsets(neighbours, distance);
  const int64_t maps = grad.size(1), plane = height * width, step = plane_step(width);
  const bool pixels = !grad.is_contiguous() && grad.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor g = pixels ? grad.to(type) : grad.to(type).contiguous();
  const Blocks blocks(height, distance);
  const Tensor out = empty_result(p.sizes(), p.options());
  const Tensor lent = at::empty({batch * blocks.count, 2, distance, classes, width}, p.options());
  for_type(p, [&](auto element) {
    using S = decltype(element);
    const S *from = p.const_data_ptr<S>(), *by = g.const_data_ptr<S>();
    S *to = out.mutable_data_ptr<S>(), *lent_rows = lent.mutable_data_ptr<S>();
    at::parallel_for(0, batch * blocks.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<PaddedLogs<S>> padded(classes, {height, width, distance, blocks.most_rows()});
      std::vector<PaddedSum<S>> sums(classes, {height, width, distance, blocks.most_rows()});
      std::vector<S> aside(width), row(pixels ? maps * step : 0);  // row [maps, step]
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks.count, block = task % blocks.count;
        const Rows own = blocks.own(block), all = blocks.around(block);
        for (int64_t k = 0; k < classes; ++k) {
          padded[k].load(from + (b * classes + k) * plane, all);
          sums[k].clear(all);
        }
        for (int64_t y = own.first; y < own.last; ++y) {
          if (pixels)
            transpose_rows(by + (b * plane + y * width) * maps, maps, width, maps, row.data(), step);
          for (int64_t k = 0; k < classes; ++k) {
            if (!product) padded[k].reach(y);
            for (size_t d = 0; d < around.size(); ++d) {
              const Offset o = around[d];
              const NeighbourRow<S> met = padded[k].pair(y, o);
              std::fill(aside.begin(), aside.end(), S(0));
              const int64_t map = product ? int64_t(d) : int64_t(d) * classes + k;
              const S* weight = pixels ? row.data() + map * step : by + (b * maps + map) * plane + y * width;
              if (product) {
                product_gradient_row(met.own, met.other, weight, width, sums[k].row(y), aside.data());
              } else {
                affinity_gradient_row(met, weight, sums[k].row(y), aside.data());
              }
              S* place = sums[k].row(y + o.y, o.x);
              for (int64_t x = 0; x < width; ++x) place[x] += aside[x];
            }
          }
        }
        const int64_t side = distance * classes * width;
        for (int64_t y = all.first; y < all.last; ++y) {
          for (int64_t k = 0; k < classes; ++k) {
            S* place = to + (b * classes + k) * plane + y * width;
            if (y < own.first) {
              place = lent_rows + task * 2 * side + ((y - all.first) * classes + k) * width;
            } else if (y >= own.last) {
              place = lent_rows + (task * 2 + 1) * side + ((y - own.last) * classes + k) * width;
            }
            const S* sum = sums[k].folded(y);
            std::copy(sum, sum + width, place);
          }
        }
      }
    });
    add_lent(lent.const_data_ptr<S>(), blocks, classes, width, to, batch);
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
      Padded<S> padded(height, width, 1, height);
      PaddedSum<S> sum(height, width, 1, gradient ? height : 0);
      for (int64_t task = begin; task < end; ++task) {
        padded.load(from + task * plane, {0, height});
        sum.clear({0, height});
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
        for (int64_t y = 0; gradient && y < height; ++y) {
          const S* row = sum.folded(y);
          std::copy(row, row + width, to + task * plane + y * width);
        }
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
