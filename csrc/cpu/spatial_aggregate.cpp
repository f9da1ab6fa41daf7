// spatial_aggregate: attention of an image to itself. The forward holds the similarities of a panel of rows
// at a time; the backward walks the symmetric tiles once, by panels of rows and chunks of columns.
#include <torch/library.h>

#include "similarity.h"

namespace fastuda {

namespace {

// Weights of the row block in place of its similarities; the products run on T.
template <class T>
void aggregate_image(const Features<T>& x, int64_t b, bool contrast, acc_t<T> alpha, T* out,
                     acc_t<T>* temperature, acc_t<T>* lse) {
  using S = acc_t<T>;
  const int64_t n = x.count, channels = x.channels, depth = round_up(n, kPair<T>);
  Packed<T> keys(channels, n), values(n, channels);
  pack_transposed(x.key(b), channels, nullptr, n, channels, keys);
  pack_rows(x.query(b), channels, nullptr, n, channels, values);
  const T* rows = x.query(b);
  const int64_t ld = padded(n), panel = panel_rows(ld, sizeof(S), channels);
  at::parallel_for(0, blocks_of(n, kRows), 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * kRows, n), most = std::min(panel, stop - begin * kRows);
    const Scratch<S> s(most * ld), o(most * kCols);
    const Scratch<T> operand(Left<T>::room(most, channels)), weights(Left<T>::room(most, depth));
    for (int64_t first = begin * kRows; first < stop; first += panel) {
      const int64_t count = std::min(panel, stop - first);
      const Left<T> w{weights.data(), count, depth};
      RowStatistics<S> statistics[kPanel];
      S sums[kPanel];
      similarity_rows(x, x, keys, b, first, count, operand.data(), s.data(), statistics);
      for (int64_t r = 0; r < count; ++r) {
        const S* row = s.data() + r * ld;
        const S best = statistics[r].best, t = contrast ? statistics[r].temperature(n) : S(1);
        sums[r] = 0;
        for (int64_t j = 0; j < n; j += kDepth) {
          sums[r] += store_softmax(row + j, std::min(kDepth, n - j), best, 1 / t, w.at(r, j));
        }
        temperature[first + r] = t;
        lse[first + r] = best / t + std::log(sums[r]);
        if (n < depth) *w.at(r, n) = T(0);
      }
      for (int64_t j = 0; j < values.blocks(); ++j) {
        tile_product(w, 0, count, 0, depth, values, j, o.data(), kCols, false);
        const int64_t width = std::min(kCols, channels - j * kCols);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (first + r) * channels + j * kCols;
          mix_rows(1 - alpha, rows + at, alpha / sums[r], o.data() + r * kCols, width, out + at);
        }
      }
    }
    release_tiles<T>();
  });
}

std::tuple<Tensor, Tensor, Tensor> aggregate_fwd(const Tensor& x, c10::string_view similarity, bool contrast,
                                                 double alpha) {
  const bool kl = is_kl(similarity);
  const int64_t batch = x.size(0), n = x.size(1), channels = x.size(2);
  const auto statistics = x.options().dtype(statistics_type(x));
  Tensor temperature = at::empty({batch, n}, statistics), lse = at::empty({batch, n}, statistics), out;
  with_element(x, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> rows(x, kl);
    out = empty_result({batch, n, rows.channels}, rows.queries.options());
    for (int64_t b = 0; b < batch; ++b) {
      aggregate_image<T>(rows, b, contrast, S(alpha), out.mutable_data_ptr<T>() + b * n * rows.channels,
                         temperature.mutable_data_ptr<S>() + b * n, lse.mutable_data_ptr<S>() + b * n);
    }
  });
  return {as_result(out, channels, x.scalar_type()), temperature, lse};
}

// The cosine's backward of one image. A tile (i, j) serves (j, i) too, so kPanel rows meet the columns from
// their own first row on; the square on the diagonal is computed whole.
template <class T>
class CosineBackward {
 public:
  using S = acc_t<T>;

  CosineBackward(const Features<T>& x, const Tensor& grad, int64_t b, S alpha, const S* temperature,
                 const S* lse, const S* delta)
      : x_(x),
        b_(b),
        n_(x.count),
        channels_(x.channels),
        alpha_(alpha),
        lse_(lse),
        delta_(delta),
        rows_(x.query(b)),
        grad_(grad.const_data_ptr<T>() + b * n_ * channels_),
        inverse_t_(n_),
        ones_(kCols, S(1)),
        ld_(padded(channels_)),
        sum_(Scratch<S>::zeros(n_ * ld_)),
        projection_(n_, S(0)) {
    for (int64_t i = 0; i < n_; ++i) inverse_t_[i] = 1 / temperature[i];
  }

  void run(T* out) {
    const int64_t panel = std::min<int64_t>(8 * kPanel, round_up(n_, kPanel));
    const int64_t fit = (int64_t(32) << 20) / (4 * panel * int64_t(sizeof(T))) / kDepth * kDepth;
    const int64_t chunk = std::min(fit, round_up(n_, kPanel));
    for (Scratch<T>* room : {&z_, &z_t_, &back_, &forward_t_}) {
      *room = Scratch<T>(std::max(Left<T>::room(panel, chunk), Left<T>::room(chunk, panel)));
    }
    for (Scratch<T>* room : {&x_rows_, &grad_rows_}) *room = Scratch<T>(Left<T>::room(panel, channels_));
    for (int64_t column = 0; column < n_; column += chunk) {
      const Chunk keys(*this, column, std::min(chunk, n_ - column));
      for (int64_t first = 0; first < column + keys.columns; first += panel) {
        step(keys, first, std::min(panel, n_ - first));
      }
    }
    finish(out);
  }

 private:
  // Columns [first, first + columns), and what the products read of them.
  struct Chunk {
    int64_t first, columns;
    Packed<T> keys_t, grad_t, keys, grads;

    Chunk(const CosineBackward& of, int64_t first_, int64_t columns_)
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

  // Rows [first, first + count) against those columns of the chunk that do not lie before them.
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
    // the first column that row r of the panel meets, and the rows that column j meets from above
    const auto start = [&](int64_t r) {
      return std::clamp<int64_t>(first + r / kPanel * kPanel - column, 0, columns);
    };
    const auto above = [&](int64_t j) {
      return std::clamp<int64_t>((column + j - first) / kPanel * kPanel, 0, count);
    };
    std::vector<S> row_sums(column_blocks * count), column_sums(row_blocks * columns);
    at::parallel_for(0, row_blocks * column_blocks, 1, [&](int64_t task, int64_t last) {
      const Scratch<S> tiles(3 * kTile * kCols);
      for (; task < last; ++task) {
        const int64_t block = task / row_blocks, r0 = task % row_blocks * kTile, j0 = block * kCols;
        if (j0 < start(r0)) continue;
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
      for (int64_t r0 = 0; r0 < above(j); r0 += kTile) {
        projection_[column + j] += column_sums[r0 / kTile * columns + j];
      }
    }
    S* sum = sum_.data();
    const int64_t row_panels = blocks_of(count, kPanel), key_panels = blocks_of(columns, kPanel);
    const int64_t depth_blocks = row_keys.blocks();
    at::parallel_for(0, row_panels * depth_blocks, 1, [&](int64_t task, int64_t last) {
      for (; task < last; ++task) {
        const int64_t block = task / row_panels, r0 = task % row_panels * kPanel;
        const int64_t m = std::min(kPanel, count - r0), depth = round_up(columns, kPair<T>);
        S* to = sum + (first + r0) * ld_ + block * kCols;
        tile_product(z, r0, m, start(r0), depth, keys.keys, block, to, ld_, true);
        tile_product(back, r0, m, start(r0), depth, keys.grads, block, to, ld_, true);
      }
      release_tiles<T>();
    });
    at::parallel_for(0, key_panels * depth_blocks, 1, [&](int64_t task, int64_t last) {
      for (; task < last; ++task) {
        const int64_t block = task / key_panels, j0 = task % key_panels * kPanel;
        const int64_t m = std::min(kPanel, columns - j0), depth = round_up(above(j0), kPair<T>);
        const int64_t at = (column + j0) * ld_ + block * kCols;
        tile_product(z_t, j0, m, 0, depth, row_keys, block, sum + at, ld_, true);
        tile_product(forward_t, j0, m, 0, depth, row_grads, block, sum + at, ld_, true);
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
    // all three by parts of the depth, so that operands which two products share are still near
    for (int64_t k = 0; k < channels_; k += kDepth) {
      const int64_t end = std::min(k + kDepth, channels_);
      tile_product(x, r0, rows, k, end, keys.keys_t, block, s, kCols, k > 0);
      tile_product(grad, r0, rows, k, end, keys.keys_t, block, forward, kCols, k > 0);
      tile_product(x, r0, rows, k, end, keys.grad_t, block, backward, kCols, k > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r0 + r;
      const AggregateTerm<S> term{alpha_,     x_.scales(b_)[i], x_.biases(b_)[i],    inverse_t_[i],
                                  lse_[i],    delta_[i],        x_.scales(b_) + key, inverse_t_.data() + key,
                                  lse_ + key, delta_ + key};
      row_sums[r] =
          aggregate_row(s + r * kCols, forward + r * kCols, backward + r * kCols, width, term, column_sums);
      store_scaled(s + r * kCols, ones_.data(), width, z.at(r0 + r, j0));
      store_scaled(backward + r * kCols, ones_.data(), width, back.at(r0 + r, j0));
    }
    store_transposed(s, kCols, ones_.data(), rows, width, z_t.at(j0, r0), z_t.stride(r0));
    store_transposed(forward, kCols, ones_.data(), rows, width, forward_t.at(j0, r0), forward_t.stride(r0));
  }

  static void pad(const Left<T>& operand, int64_t columns) {
    for (int64_t r = 0; columns < operand.depth && r < operand.rows; ++r) *operand.at(r, columns) = T(0);
  }

  void finish(T* out) const {
    S* sum = sum_.data();
    at::parallel_for(0, n_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = rows_ + i * channels_;
        S *g = sum + i * ld_, scale = x_.scales(b_)[i];
        add_scaled(-projection_[i] * scale * scale, x, channels_, g);
        mix_rows(1 - alpha_, grad_ + i * channels_, S(1), g, channels_, out + i * channels_);
      }
    });
  }

  const Features<T>& x_;
  int64_t b_, n_, channels_;
  S alpha_;
  const S *lse_, *delta_;
  const T *rows_, *grad_;
  std::vector<S> inverse_t_, ones_;
  int64_t ld_;  // of sums over the channels
  Scratch<S> sum_;
  Scratch<T> x_rows_, grad_rows_, z_, z_t_, back_, forward_t_;
  std::vector<S> projection_;
};

// The KL similarity's backward of one image, all rows against all columns. Its features are as narrow as
// there are classes: a tile is multiplied where it lies, for the keys as the right-hand side of transposed
// sums.
template <class S>
void kl_backward(const Features<S>& x, const S* grad, int64_t b, S alpha, const S* temperature, const S* lse,
                 const S* delta, S* out) {
  const int64_t n = x.count, channels = x.channels, ld = round_up(channels, 16);
  const S *rows = x.query(b), *biases = x.biases(b);
  Packed<S> keys_t(channels, n), values_t(channels, n), keys(n, channels);
  pack_transposed(x.key(b), channels, nullptr, n, channels, keys_t);
  pack_transposed(rows, channels, nullptr, n, channels, values_t);
  pack_rows(x.key(b), channels, nullptr, n, channels, keys);
  const auto transposed = [&](const S* from) {
    Scratch<S> to(channels * n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < channels; ++c) to.data()[c * n + i] = from[i * channels + c];
    }
    return to;
  };
  const Scratch<S> rows_t = transposed(rows), grad_t = transposed(grad);
  const std::vector<S> ones(kCols, S(1));
  std::vector<Scratch<S>> query_sum(at::get_num_threads());  // of the columns that one thread saw

  at::parallel_for(0, keys_t.blocks(), 1, [&](int64_t block, int64_t last) {
    Scratch<S>& queries = query_sum[at::get_thread_num()] = Scratch<S>(n * ld);
    std::fill_n(queries.data(), n * ld, S(0));
    const Scratch<S> z(kRows * kCols), w(kRows * kCols), key_sum(channels * kCols),
        value_sum(channels * kCols);
    for (; block < last; ++block) {
      const int64_t j0 = block * kCols, width = std::min(kCols, n - j0), whole = keys_t.width(block);
      for (int64_t first = 0; first < n; first += kRows) {
        const int64_t count = std::min(kRows, n - first);
        tile_product(count, channels, rows + first * channels, channels, keys_t, block, z.data(), kCols,
                     false);
        tile_product(count, channels, grad + first * channels, channels, values_t, block, w.data(), kCols,
                     false);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = first + r;
          const AggregateTerm<S> term{alpha,   S(1),     biases[i],   1 / temperature[i],
                                      lse[i],  delta[i], ones.data(), nullptr,
                                      nullptr, nullptr};
          aggregate_row(z.data() + r * kCols, w.data() + r * kCols, nullptr, width, term, nullptr);
        }
        for (int64_t c = 0; c < keys.blocks(); ++c) {
          tile_product(count, width, z.data(), kCols, keys, c, queries.data() + first * ld + c * kCols, ld,
                       true, j0);
        }
        plain_product(channels, whole, count, rows_t.data() + first, n, z.data(), kCols, key_sum.data(),
                      kCols, first > 0);
        plain_product(channels, whole, count, grad_t.data() + first, n, w.data(), kCols, value_sum.data(),
                      kCols, first > 0);
      }
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = (j0 + j) * channels + c;
          out[at] = (1 - alpha) * grad[at] + value_sum.data()[c * kCols + j] +
                    key_sum.data()[c * kCols + j] / (rows[at] + S(1e-10));
        }
      }
    }
    release_tiles<S>();
  });
  for (const Scratch<S>& part : query_sum) {
    if (!part.data()) continue;
    for (int64_t i = 0; i < n; ++i) add_scaled(S(1), part.data() + i * ld, channels, out + i * channels);
  }
}

Tensor aggregate_bwd(const Tensor& grad, const Tensor& x, const Tensor& out, const Tensor& temperature,
                     const Tensor& lse, c10::string_view similarity, double alpha) {
  const bool kl = is_kl(similarity);
  const int64_t batch = x.size(0), n = x.size(1), channels = x.size(2);
  const Tensor t = temperature.contiguous(), l = lse.contiguous();
  Tensor result;
  with_element(x, kl, [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const Features<T> rows(x, kl);
    Tensor g = grad.to(rows.queries.scalar_type()).contiguous();
    // delta_i = alpha grad_i . (W x)_i, and alpha W x is what the forward added to (1 - alpha) x
    Tensor delta = at::empty({batch, n}, rows.scale.options());
    const Tensor y = out.to(rows.queries.scalar_type()).contiguous();
    at::parallel_for(0, batch * n, 64, [&](int64_t begin, int64_t end) {
      const T *py = y.const_data_ptr<T>(), *px = rows.query(0), *pg = g.const_data_ptr<T>();
      S* to = delta.mutable_data_ptr<S>();
      for (int64_t i = begin; i < end; ++i) {
        const T* gi = pg + i * channels;
        to[i] = inner(py + i * channels, gi, channels) -
                S(1 - alpha) * inner(px + i * rows.channels, gi, channels);
      }
    });
    if (g.size(2) != rows.channels) g = at::constant_pad_nd(g, {0, 1});
    result = empty_result({batch, n, rows.channels}, rows.queries.options());
    for (int64_t b = 0; b < batch; ++b) {
      const S *temperatures = t.const_data_ptr<S>() + b * n, *sums = l.const_data_ptr<S>() + b * n;
      const S* deltas = delta.const_data_ptr<S>() + b * n;
      T* to = result.mutable_data_ptr<T>() + b * n * rows.channels;
      if constexpr (!std::is_same_v<T, BFloat16>) {
        if (kl) {
          const T* from = g.template const_data_ptr<T>() + b * n * channels;
          kl_backward<S>(rows, from, b, S(alpha), temperatures, sums, deltas, to);
          continue;
        }
      }
      CosineBackward<T>(rows, g, b, S(alpha), temperatures, sums, deltas).run(to);
    }
  });
  return as_result(result, channels, x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("aggregate_fwd.cpu", &aggregate_fwd);
  m.impl("aggregate_bwd.cpu", &aggregate_bwd);
}

}  // namespace fastuda
