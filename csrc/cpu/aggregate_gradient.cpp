// A tile (i, j) of similarities is used for (j, i) too. The operands of a chunk of columns are packed once
// and multiplied by the panels of rows not before the chunk. Squares on the diagonal are computed whole.
#include "aggregate_gradient.h"

#include "tasks.h"

namespace fastuda {

namespace {

// Columns of a chunk and rows of a panel. The operands of a chunk are packed once, those of a panel once per
// chunk. Larger ones take more memory and were not faster.
constexpr int64_t kChunk = 1024;
constexpr int64_t kShort = 256;
constexpr int kFew = 4;  // threads for which a panel of kShort rows has enough tiles; more get 2 kShort

template <class T>
class Gradient {
 public:
  using S = acc_t<T>;

  Gradient(const Features<T>& x, const Tensor& grad, int64_t b, S alpha, const S* temperature,
           const S* log_sum, const S* delta, T* out)
      : n_(x.count),
        channels_(x.channels),
        alpha_(alpha),
        log_sum_(log_sum),
        delta_(delta),
        scales_(x.scales(b)),
        rows_(x.query(b)),
        grad_(grad.const_data_ptr<T>() + b * n_ * channels_),
        out_(out),
        inverse_t_(n_),
        ones_(kCols, S(1)),
        projection_(n_, S(0)) {
    for (int64_t i = 0; i < n_; ++i) inverse_t_[i] = 1 / temperature[i];
    if constexpr (std::is_same_v<T, S>) {
      if (channels_ % 16 == 0) sum_ = out, ld_ = channels_;
    }
    if (!sum_) {
      ld_ = padded(channels_);
      sums_ = Scratch<S>(n_ * ld_);
      sum_ = sums_.data();
    }
  }

  void run() {
    const int64_t most = round_up(n_, kPanel);
    const int64_t panel = std::min(at::get_num_threads() > kFew ? 2 * kShort : kShort, most);
    const int64_t chunk = std::min(kChunk, most);
    const int64_t room = std::max(Left<T>::room(panel, chunk), Left<T>::room(chunk, panel));
    for (Scratch<T>* operand : {&z_, &z_t_, &back_, &forward_t_}) *operand = Scratch<T>(room);
    for (Scratch<T>* operand : {&x_rows_, &grad_rows_})
      *operand = Scratch<T>(Left<T>::room(panel, channels_));
    for (int64_t column = 0; column < n_; column += chunk) {
      const Chunk keys(*this, column, std::min(chunk, n_ - column));
      for (int64_t first = column; first < n_; first += panel) step(keys, first, std::min(panel, n_ - first));
      finish(column, keys.columns);
    }
  }

 private:
  // Columns [first, first + columns), and their operands for the products.
  struct Chunk {
    int64_t first, columns;
    Packed<T> keys_t, grad_t, keys, grads;

    Chunk(const Gradient& of, int64_t first_, int64_t columns_)
        : first(first_),
          columns(columns_),
          keys_t(of.channels_, columns),
          grad_t(of.channels_, columns),
          keys(columns, of.channels_),
          grads(columns, of.channels_) {
      of.pack(first, columns, keys, grads);
      pack_transposed(of.rows_ + first * of.channels_, of.channels_, nullptr, columns, of.channels_, keys_t);
      pack_transposed(of.grad_ + first * of.channels_, of.channels_, nullptr, columns, of.channels_, grad_t);
    }
  };

  void pack(int64_t first, int64_t count, const Packed<T>& keys, const Packed<T>& grads) const {
    pack_rows(rows_ + first * channels_, channels_, nullptr, count, channels_, keys);
    pack_rows(grad_ + first * channels_, channels_, nullptr, count, channels_, grads);
  }

  // Rows [first, first + count) against the columns of the chunk that are not after them.
  void step(const Chunk& keys, int64_t first, int64_t count) {
    const int64_t column = keys.first, columns = keys.columns;
    const Left<T> x{x_rows_.data(), count, channels_}, grad{grad_rows_.data(), count, channels_};
    at::parallel_for(0, count, 16, [&](int64_t r, int64_t last) {
      for (; r < last; ++r) {
        x.set_row(r, rows_ + (first + r) * channels_);
        grad.set_row(r, grad_ + (first + r) * channels_);
      }
    });
    const Packed<T> row_keys(count, channels_), row_grads(count, channels_);
    pack(first, count, row_keys, row_grads);
    const Left<T> z{z_.data(), count, round_up(columns, 2)}, back{back_.data(), count, z.depth};
    const Left<T> z_t{z_t_.data(), columns, round_up(count, 2)},
        forward_t{forward_t_.data(), columns, z_t.depth};
    const int64_t row_blocks = blocks_of(count, kTile), column_blocks = blocks_of(columns, kCols);
    // the columns that row r of the panel meets, and the rows from which on they are below column j's square
    const auto met = [&](int64_t r) {
      return std::clamp<int64_t>((first + r) / kPanel * kPanel + kPanel - column, 0, columns);
    };
    const auto below = [&](int64_t j) {
      return std::clamp<int64_t>((column + j) / kPanel * kPanel + kPanel - first, 0, count);
    };
    std::vector<S> row_sums(column_blocks * count), column_sums(row_blocks * columns);
    share_tasks(row_blocks * column_blocks, [&](const auto& take) {
      const Scratch<S> tiles(3 * kTile * kCols);
      for (int64_t task; (task = take()) >= 0;) {
        const int64_t block = task / row_blocks, r0 = task % row_blocks * kTile, j0 = block * kCols;
        if (j0 >= met(r0)) continue;
        tile(x, grad, first, r0, keys, block, tiles.data(), row_sums.data() + block * count + r0,
             column_sums.data() + r0 / kTile * columns + j0, z, z_t, back, forward_t);
      }
      release_tiles<T>();
    });
    pad(z, columns), pad(back, columns), pad(z_t, count), pad(forward_t, count);
    for (int64_t block = 0; block < column_blocks; ++block) {
      for (int64_t r = 0; r < count; ++r) projection_[first + r] += row_sums[block * count + r];
    }
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t r0 = below(j); r0 < count; r0 += kTile) {
        projection_[column + j] += column_sums[r0 / kTile * columns + j];
      }
    }
    const int64_t row_panels = blocks_of(count, kPanel), key_panels = blocks_of(columns, kPanel);
    const int64_t depth_blocks = row_keys.blocks();
    share_tasks(row_panels * depth_blocks, [&](const auto& take) {
      for (int64_t task; (task = take()) >= 0;) {
        const int64_t block = task / row_panels, r0 = task % row_panels * kPanel;
        const int64_t m = std::min(kPanel, count - r0), depth = round_up(met(r0), kPair<T>);
        S* to = sum_ + (first + r0) * ld_ + block * kCols;
        // every row meets the first chunk before any other
        tile_product(z, r0, m, 0, depth, keys.keys, block, to, ld_, column > 0);
        tile_product(back, r0, m, 0, depth, keys.grads, block, to, ld_, true);
      }
      release_tiles<T>();
    });
    share_tasks(key_panels * depth_blocks, [&](const auto& take) {
      for (int64_t task; (task = take()) >= 0;) {
        const int64_t block = task / key_panels, j0 = task % key_panels * kPanel;
        if (below(j0) == count) continue;
        const int64_t m = std::min(kPanel, columns - j0), depth = round_up(count, kPair<T>);
        S* to = sum_ + (column + j0) * ld_ + block * kCols;
        tile_product(z_t, j0, m, below(j0), depth, row_keys, block, to, ld_, true);
        tile_product(forward_t, j0, m, below(j0), depth, row_grads, block, to, ld_, true);
      }
      release_tiles<T>();
    });
  }

  void tile(const Left<T>& x, const Left<T>& grad, int64_t first, int64_t r0, const Chunk& keys,
            int64_t block, S* tiles, S* row_sums, S* column_sums, const Left<T>& z, const Left<T>& z_t,
            const Left<T>& back, const Left<T>& forward_t) const {
    constexpr int64_t size = kTile * kCols;
    S *s = tiles, *forward = tiles + size, *backward = tiles + 2 * size;
    const int64_t j0 = block * kCols, width = std::min(kCols, keys.columns - j0), key = keys.first + j0;
    const int64_t rows = std::min(kTile, x.rows - r0);
    // all three products in parts of the depth, so that shared operands are still in the cache
    for (int64_t k = 0; k < channels_; k += kDepth) {
      const int64_t end = std::min(k + kDepth, channels_);
      tile_product(x, r0, rows, k, end, keys.keys_t, block, s, kCols, k > 0);
      tile_product(grad, r0, rows, k, end, keys.keys_t, block, forward, kCols, k > 0);
      tile_product(x, r0, rows, k, end, keys.grad_t, block, backward, kCols, k > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r0 + r, own = i - key;
      S* row = s + r * kCols;
      AggregateTerm<S> term{alpha_,         scales_[i],  S(0),          inverse_t_[i],
                            log_sum_[i],    delta_[i],   scales_ + key, inverse_t_.data() + key,
                            log_sum_ + key, delta_ + key};
      const bool meets_itself = own >= 0 && own < width;
      if (meets_itself) {  // with the exact similarity, as in the forward
        scale_best(row, width, scales_[i], scales_ + key);
        row[own] = scales_[i] != 0;
        term.scale = 1, term.key_scale = ones_.data();
      }
      row_sums[r] = aggregate_row(row, forward + r * kCols, backward + r * kCols, width, term, column_sums);
      if (meets_itself) scale_best(row, width, scales_[i], scales_ + key);
      store_scaled(row, ones_.data(), width, z.at(r0 + r, j0));
      store_scaled(backward + r * kCols, ones_.data(), width, back.at(r0 + r, j0));
    }
    store_transposed(s, kCols, ones_.data(), rows, width, z_t.at(j0, r0), z_t.stride(r0));
    store_transposed(forward, kCols, ones_.data(), rows, width, forward_t.at(j0, r0), forward_t.stride(r0));
  }

  static void pad(const Left<T>& operand, int64_t columns) {
    for (int64_t r = 0; columns < operand.depth && r < operand.rows; ++r) *operand.at(r, columns) = T(0);
  }

  // Rows [first, first + count), whose sums are complete.
  void finish(int64_t first, int64_t count) const {
    at::parallel_for(first, first + count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = rows_ + i * channels_;
        S *g = sum_ + i * ld_, scale = scales_[i];
        add_scaled(-projection_[i] * scale * scale, x, channels_, g);
        mix_rows(1 - alpha_, grad_ + i * channels_, S(1), g, channels_, out_ + i * channels_);
      }
    });
    if (sums_.data()) drop_pages(sum_ + first * ld_, size_t(count * ld_) * sizeof(S));
  }

  int64_t n_, channels_;
  S alpha_;
  const S *log_sum_, *delta_, *scales_;
  const T *rows_, *grad_;
  T* out_;
  std::vector<S> inverse_t_, ones_, projection_;
  S* sum_ = nullptr;  // [N, channels] of leading dimension ld_: the result itself if its type can hold sums
  int64_t ld_ = 0;
  Scratch<S> sums_;
  Scratch<T> x_rows_, grad_rows_, z_, z_t_, back_, forward_t_;
};

}  // namespace

template <class T>
void aggregate_gradient(const Features<T>& x, const Tensor& grad, int64_t b, acc_t<T> alpha,
                        const acc_t<T>* temperature, const acc_t<T>* log_sum, const acc_t<T>* delta, T* out) {
  Gradient<T>(x, grad, b, alpha, temperature, log_sum, delta, out).run();
}

#define INSTANTIATE(T)                                                                                       \
  template void aggregate_gradient<T>(const Features<T>&, const Tensor&, int64_t, acc_t<T>, const acc_t<T>*, \
                                      const acc_t<T>*, const acc_t<T>*, T*);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastuda
