// Recomputes tiles of similarities. Only matched rows and the columns that they match have a gradient; the
// rest is skipped.
#include "association_gradient.h"

#include "tasks.h"

namespace fastuda {

namespace {

constexpr int64_t kSquare = 1536;  // number of rows and keys whose gradients are operands at a time

std::vector<int64_t> positions(const std::vector<int64_t>& order) {
  std::vector<int64_t> position(order.size());
  for (size_t i = 0; i < order.size(); ++i) position[order[i]] = int64_t(i);
  return position;
}

// Gradient of the similarities of one image, by panels of query rows. Rows and keys are taken in the given
// orders. The gradient of the keys is summed in key order; that of a query row is passed on when complete.
template <class T>
class Backward {
 public:
  using S = acc_t<T>;

  Backward(const Features<T>& queries, const Features<T>& keys, int64_t b, std::vector<int64_t> row_order,
           std::vector<int64_t> key_order)
      : rows_(queries.query(b)),
        scales_(queries.scales(b)),
        order_(std::move(row_order)),
        key_order_(std::move(key_order)),
        position_(positions(order_)),
        key_position_(positions(key_order_)),
        channels_(queries.channels),
        transposed_(channels_, keys.count),
        straight_(keys.count, channels_, kUnit),
        ld_(padded(channels_)),
        key_scale_(keys.count),
        key_grad_(keys.count * ld_) {
    pack_transposed(keys.key(b), channels_, key_order_.data(), keys.count, channels_, transposed_);
    pack_rows(keys.key(b), channels_, key_order_.data(), keys.count, channels_, straight_);
    for (int64_t j = 0; j < keys.count; ++j) key_scale_[j] = keys.scales(b)[key_order_[j]];
  }

  // Cross-entropies of the first `count` keys in key order, as queries of the transposed similarity.
  void set_columns(const Terms<S>& terms, int64_t count) {
    column_count_ = count;
    const int64_t n = int64_t(key_order_.size());
    column_weight_.assign(n, 0), column_inverse_.assign(n, 0), column_lse_.assign(n, 0);
    column_hit_.assign(n, -1);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t key = key_order_[j];
      column_weight_[j] = terms.weight[key] / terms.temperature[key];
      column_inverse_[j] = 1 / terms.temperature[key];
      column_lse_[j] = terms.lse[key];
      column_hit_[j] = position_[terms.index[key]];
    }
  }

  // Rows [begin, end) of the row order against the first `columns` keys, no more than in the call before;
  // take(row, gradient of the row).
  template <class Take>
  void run(int64_t begin, int64_t end, int64_t columns, const Terms<S>* terms, Take&& take) {
    if (columns == 0) return;
    // squares, so that the sums of rows and those of keys are read and written equally often
    const int64_t ld = ld_, panel = std::min(kSquare, round_up(end - begin, kRows));
    const int64_t chunk = std::min(kSquare, round_up(columns, kUnit));
    const Scratch<T> row_operand(Left<T>::room(panel, chunk)), column_operand(Left<T>::room(chunk, panel));
    const Scratch<T> gathered(Left<T>::room(panel, channels_));
    const Scratch<S> row_grad(panel * ld);
    S *dq = row_grad.data(), *dk = key_grad_.data();

    for (int64_t first = begin; first < end; first += panel) {
      const int64_t count = std::min(panel, end - first);
      const Left<T> q{gathered.data(), count, channels_};
      at::parallel_for(0, count, 16, [&](int64_t r, int64_t last) {
        for (; r < last; ++r) q.set_row(r, rows_ + order_[first + r] * channels_);
      });
      Packed<T> panel_rows(count, channels_, kUnit);
      pack_rows(rows_, channels_, order_.data() + first, count, channels_, panel_rows);

      for (int64_t column = 0; column < columns; column += chunk) {
        const int64_t width = std::min(chunk, columns - column);
        const Left<T> g{row_operand.data(), count, round_up(width, kUnit)};
        const Left<T> gt{column_operand.data(), width, round_up(count, kUnit)};
        const int64_t row_blocks = blocks_of(count, kTile), column_blocks = blocks_of(width, kCols);
        const int64_t depth_blocks = straight_.blocks();
        share_tasks(row_blocks * column_blocks, [&](const auto& take) {
          const Scratch<S> tile(kTile * kCols);
          for (int64_t task; (task = take()) >= 0;) {
            const int64_t r0 = task % row_blocks * kTile, j0 = task / row_blocks * kCols;
            gradient_tile(first, r0, column, j0, q, terms, tile.data(), g, gt);
          }
          release_tiles<T>();
        });
        const int64_t row_panels = blocks_of(count, kPanel), key_panels = blocks_of(width, kPanel);
        share_tasks(row_panels * depth_blocks, [&](const auto& take) {
          for (int64_t task; (task = take()) >= 0;) {
            const int64_t r0 = task % row_panels * kPanel, block = task / row_panels;
            tile_product(g, r0, std::min(kPanel, count - r0), 0, g.depth, straight_, block,
                         dq + r0 * ld + block * kCols, ld, column > 0, column);
          }
          release_tiles<T>();
        });
        share_tasks(key_panels * depth_blocks, [&](const auto& take) {
          for (int64_t task; (task = take()) >= 0;) {
            const int64_t j0 = task % key_panels * kPanel, block = task / key_panels;
            tile_product(gt, j0, std::min(kPanel, width - j0), 0, panel_rows.depth, panel_rows, block,
                         dk + (column + j0) * ld + block * kCols, ld, touched_ > 0);
          }
          release_tiles<T>();
        });
      }
      touched_ = std::max(touched_, columns);
      at::parallel_for(0, count, 16, [&](int64_t r, int64_t last) {
        for (; r < last; ++r) take(order_[first + r], dq + r * ld);
      });
    }
  }

  // take(key, gradient of the key row), for the keys that have a gradient
  template <class Take>
  void finish(Take&& take) {
    const S* dk = key_grad_.data();
    at::parallel_for(0, touched_, 16, [&](int64_t j, int64_t last) {
      for (; j < last; ++j) take(key_order_[j], dk + j * ld_);
    });
  }

 private:
  // Writes the tile that begins at row first + r0 and key column + j0 into both operands.
  void gradient_tile(int64_t first, int64_t r0, int64_t column, int64_t j0, const Left<T>& q,
                     const Terms<S>* terms, S* tile, const Left<T>& g, const Left<T>& gt) const {
    const int64_t count = q.rows, columns = gt.rows, key = column + j0;
    const int64_t rows = std::min(kTile, count - r0), width = std::min(kCols, columns - j0);
    tile_product(q, r0, rows, 0, channels_, transposed_, key / kCols, tile, kCols, false);
    const ColumnTerm<S> column_terms{column_weight_.data() + key, column_inverse_.data() + key,
                                     column_lse_.data() + key};
    const bool has_columns = key < column_count_;
    S scale[kTile];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = order_[first + r0 + r];
      scale[r] = scales_[i];
      const RowScale<S> similarity{scales_[i], S(0), key_scale_.data() + key};
      RowTerm<S> row{};
      if (terms) row = {terms->weight[i] / terms->temperature[i], 1 / terms->temperature[i], terms->lse[i]};
      softmax_row(tile + r * kCols, width, similarity, terms ? &row : nullptr,
                  has_columns ? &column_terms : nullptr);
      if (terms) {
        const int64_t hit = key_position_[terms->index[i]] - key;
        if (hit >= 0 && hit < width) tile[r * kCols + hit] -= row.weight_over_t;
      }
    }
    for (int64_t j = key; j < std::min(key + width, column_count_); ++j) {
      const int64_t hit = column_hit_[j] - first - r0;
      if (hit >= 0 && hit < rows) tile[hit * kCols + j - key] -= column_weight_[j];
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* to = g.at(r0 + r, j0);
      store_scaled(tile + r * kCols, key_scale_.data() + key, width, to);
      if (j0 + width == columns) std::fill(to + width, to + g.depth - j0, T(0));
    }
    store_transposed(tile, kCols, scale, rows, width, gt.at(j0, r0), gt.stride(r0));
    if (r0 + rows == count) {
      for (int64_t j = 0; j < width; ++j) {
        T* to = gt.at(j0 + j, r0);
        std::fill(to + rows, to + gt.depth - r0, T(0));
      }
    }
  }

  const T* rows_;
  const S* scales_;
  std::vector<int64_t> order_, key_order_, position_, key_position_;
  int64_t channels_;
  Packed<T> transposed_, straight_;
  int64_t ld_;  // of sums over the channels
  std::vector<S> key_scale_, column_weight_, column_inverse_, column_lse_;
  std::vector<int64_t> column_hit_;
  int64_t column_count_ = 0, touched_ = 0;  // number of the first keys with a gradient in key_grad_
  Scratch<S> key_grad_;
};

}  // namespace

template <class T>
void association_gradient(const Features<T>& a, const Features<T>& b, const Terms<acc_t<T>>& source,
                          const Terms<acc_t<T>>& target, int64_t image, T* grad_a, T* grad_b) {
  using S = acc_t<T>;
  auto [rows, matched] = weighted_first(source.weight, a.count);
  auto [keys, hit] = weighted_first(target.weight, b.count);
  Backward<T> backward(a, b, image, rows, keys);
  backward.set_columns(target, hit);
  const auto without = [](const std::vector<int64_t>& order, int64_t first, int64_t channels, T* grad) {
    for (size_t i = first; i < order.size(); ++i) std::fill_n(grad + order[i] * channels, channels, T(0));
  };
  if (hit == 0) without(rows, matched, a.channels, grad_a);
  if (matched == 0) without(keys, hit, b.channels, grad_b);
  const S* norm_a = a.norm.template const_data_ptr<S>() + image * a.count;
  const S* norm_b = b.norm.template const_data_ptr<S>() + image * b.count;
  const auto take = [&](int64_t row, const S* g) {
    unit_gradient(g, a.query(image) + row * a.channels, norm_a[row], a.channels, grad_a + row * a.channels);
  };
  backward.run(0, matched, b.count, &source, take);
  backward.run(matched, a.count, hit, nullptr, take);
  backward.finish([&](int64_t row, const S* g) {
    unit_gradient(g, b.query(image) + row * b.channels, norm_b[row], b.channels, grad_b + row * b.channels);
  });
}

#define INSTANTIATE(T)                                                                                  \
  template void association_gradient<T>(const Features<T>&, const Features<T>&, const Terms<acc_t<T>>&, \
                                        const Terms<acc_t<T>>&, int64_t, T*, T*);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastuda
