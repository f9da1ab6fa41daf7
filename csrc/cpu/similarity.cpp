#include "similarity.h"

#include "tasks.h"

namespace fastuda {

Tensor as_result(const Tensor& x, int64_t channels, at::ScalarType type) {
  return x.size(2) == channels ? x.to(type)
                               : x.narrow(2, 0, channels).to(type).clone(at::MemoryFormat::Contiguous);
}

template <class T>
Features<T>::Features(const Tensor& x, bool kl) : count(x.size(1)) {
  const auto element = at::CppTypeToScalarType<T>::value;
  const auto statistics = x.options().dtype(at::CppTypeToScalarType<S>::value);
  queries = x.to(element).contiguous();
  if (queries.size(2) % kPair<T>) queries = at::constant_pad_nd(queries, {0, 1});
  channels = queries.size(2);
  if (kl) {
    // a constant added to all logarithms is cancelled by the bias; this one keeps the products small
    keys = queries.add(1e-10).log_().add_(std::log(double(channels)) + 2);
    bias = queries.to(at::kDouble).mul(keys).sum(-1).neg_().to(statistics.dtype());
    norm = scale = at::ones({x.size(0), count}, statistics);
    return;
  }
  keys = queries;
  bias = at::zeros({x.size(0), count}, statistics);
  norm = at::empty({x.size(0), count}, statistics);
  S* to = norm.template mutable_data_ptr<S>();
  at::parallel_for(0, x.size(0) * count, 256, [&](int64_t begin, int64_t end) {
    const T* rows = queries.template const_data_ptr<T>();
    for (int64_t i = begin; i < end; ++i) to[i] = std::sqrt(sum_squares(rows + i * channels, channels));
  });
  // a row of length zero has no direction: its similarities are 0, and it gets no gradient
  scale = norm.reciprocal().masked_fill_(norm.le(1e-12), 0);
}

template <class T>
void similarity_rows(const Features<T>& queries, const Features<T>& keys, const Packed<T>& packed, int64_t b,
                     int64_t first, int64_t count, T* operand, acc_t<T>* s,
                     RowStatistics<acc_t<T>>* statistics) {
  using S = acc_t<T>;
  const int64_t depth = queries.channels, ld = padded(keys.count);
  const S *scales = queries.scales(b) + first, *biases = queries.biases(b) + first;
  const S* key_scales = keys.scales(b);
  const Left<T> rows{operand, count, depth};
  for (int64_t r = 0; r < count; ++r) rows.set_row(r, queries.query(b) + (first + r) * depth);
  for (int64_t j = 0; j < packed.blocks(); ++j) {
    const int64_t column = j * kCols, width = std::min(kCols, keys.count - column);
    tile_product(rows, 0, count, 0, depth, packed, j, s + column, ld, false);
    for (int64_t r = 0; r < count; ++r) {
      S* row = s + r * ld + column;
      const RowScale<S> scale{scales[r], biases[r], key_scales + column};
      const S best = statistics[r].best;
      if (j == 0) statistics[r].shift = mean_row(row, width, scale);
      scale_row(row, width, scale, statistics[r]);
      if (statistics[r].best > best) statistics[r].best_block = j;
    }
  }
}

int64_t panel_rows(int64_t rows, int64_t columns, int64_t bytes, int64_t channels) {
  constexpr int64_t kAll = int64_t(64) << 20, kLeast = 16;
  const int64_t threads = at::get_num_threads(), fit = kAll / threads / (columns * bytes);
  // keys as narrow as the number of classes stay in the cache, and so does a smaller panel
  const int64_t most =
      channels <= kRows ? kRows : std::min(kPanel, round_up(blocks_of(rows, threads), kRows));
  const int64_t unit = fit < kRows ? kLeast : kRows;
  return std::clamp(fit / unit * unit, kLeast, most);
}

template <class T>
void row_pass(const Features<T>& queries, const Features<T>& keys, int64_t b,
              const RowResults<acc_t<T>>& out) {
  using S = acc_t<T>;
  const int64_t n = queries.count, m = keys.count;
  Packed<T> packed(queries.channels, m);
  pack_transposed(keys.key(b), queries.channels, nullptr, m, queries.channels, packed);
  const int64_t ld = padded(m), panel = panel_rows(n, ld, sizeof(S), queries.channels);
  share_tasks(blocks_of(n, panel), [&](const auto& take) {
    const Scratch<S> s(panel * ld);
    const Scratch<T> operand(Left<T>::room(panel, queries.channels));
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t first = task * panel, count = std::min(panel, n - first);
      RowStatistics<S> statistics[kPanel];
      similarity_rows(queries, keys, packed, b, first, count, operand.data(), s.data(), statistics);
      for (int64_t r = 0; r < count; ++r) {
        const S* row = s.data() + r * ld;
        const S best = statistics[r].best, t = statistics[r].temperature(m);
        const int64_t start = statistics[r].best_block * kCols;
        out.index[first + r] = start + first_index(row + start, std::min(kCols, m - start), best);
        out.best[first + r] = best;
        out.temperature[first + r] = t;
        out.lse[first + r] = best / t + std::log(sum_exp(row, m, best, 1 / t));
      }
    }
    release_tiles<T>();
  });
}

#define INSTANTIATE(T)                                                                                \
  template struct Features<T>;                                                                        \
  template void similarity_rows<T>(const Features<T>&, const Features<T>&, const Packed<T>&, int64_t, \
                                   int64_t, int64_t, T*, acc_t<T>*, RowStatistics<acc_t<T>>*);        \
  template void row_pass<T>(const Features<T>&, const Features<T>&, int64_t, const RowResults<acc_t<T>>&);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastuda
