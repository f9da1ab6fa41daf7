// Both hops of a cosine similarity from one product. A tile is reduced for its rows and its columns while it
// is in the cache, so that no row of similarities is stored.
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>

#include "similarity.h"
#include "tasks.h"

namespace fastuda {

namespace {

// Rows of unit length, in the type of the statistics.
template <class T>
Tensor unit_rows(const Features<T>& x, int64_t b, int64_t first, int64_t count) {
  const Tensor rows = x.queries.select(0, b).narrow(0, first, count);
  return rows.to(x.scale.scalar_type()) * x.scale.select(0, b).narrow(0, first, count).unsqueeze(1);
}

constexpr int64_t kWidened = 4096;  // rows that are widened at a time for the covariance

// Largest number of parts of the rows; their results for the columns are merged in order.
constexpr int64_t kParts = 16;

// The result for the columns from the rows of one part.
template <class S>
struct Columns {
  std::vector<S> best, sum;
  std::vector<int32_t> index;
};

template <class S>
std::vector<S> inverses(const S* temperature, int64_t n) {
  std::vector<S> inverse(n);
  for (int64_t i = 0; i < n; ++i) inverse[i] = 1 / temperature[i];
  return inverse;
}

}  // namespace

template <class T>
Tensor covariance_temperatures(const Features<T>& queries, const Features<T>& keys, int64_t b) {
  const int64_t m = keys.count, channels = keys.channels;
  Tensor sum = at::zeros({channels}, keys.scale.options());
  for (int64_t first = 0; first < m; first += kWidened) {
    sum += unit_rows(keys, b, first, std::min(kWidened, m - first)).sum(0);
  }
  const Tensor mean = sum / m;
  Tensor covariance = at::zeros({channels, channels}, keys.scale.options());
  for (int64_t first = 0; first < m; first += kWidened) {
    const Tensor centred = unit_rows(keys, b, first, std::min(kWidened, m - first)) - mean;
    covariance.addmm_(centred.t(), centred, 1, 1.0 / double(std::max<int64_t>(m - 1, 1)));
  }
  Tensor temperature = at::empty({queries.count}, queries.scale.options());
  for (int64_t first = 0; first < queries.count; first += kWidened) {
    const int64_t count = std::min(kWidened, queries.count - first);
    const Tensor rows = unit_rows(queries, b, first, count);
    temperature.narrow(0, first, count).copy_(at::mm(rows, covariance).mul_(rows).sum(1));
  }
  temperature.clamp_min_(0).sqrt_();
  return at::where(temperature.le(kRounding<acc_t<T>>), 1, temperature.add(1e-10))
      .to(temperature.scalar_type());
}

template <class T>
bool covariance_is_cheaper(const Features<T>& queries, const Features<T>& keys) {
  constexpr int64_t slower = kPair<T> == 2 ? 6 : 1;  // least time of float32 products relative to those of T
  return 8 * slower * queries.channels <= std::min(queries.count, keys.count);
}

template <class T>
void both_hops(const Features<T>& queries, const Features<T>& keys, int64_t b,
               const RowResults<acc_t<T>>& rows, const RowResults<acc_t<T>>& columns) {
  using S = acc_t<T>;
  const int64_t n = queries.count, m = keys.count, depth = queries.channels;
  const bool sums = rows.lse != nullptr;
  TORCH_CHECK_VALUE(n <= std::numeric_limits<int32_t>::max(), "more pixels than an int32 can count");
  Packed<T> packed(depth, m);
  pack_transposed(keys.key(b), depth, nullptr, m, depth, packed);
  const std::vector<S> row_inverse = inverses(rows.temperature, sums ? n : 0);
  const std::vector<S> column_inverse = inverses(columns.temperature, sums ? m : 0);
  const int64_t unit = n < kParts * kPanel ? kRows : kPanel, units = blocks_of(n, unit);
  const int64_t parts = std::min(kParts, units);
  std::vector<Columns<S>> found(parts);
  constexpr S none = -std::numeric_limits<S>::infinity();

  share_tasks(parts, [&](const auto& take) {
    const int64_t most = std::min(kPanel, n);
    const Scratch<S> tile(most * kCols);
    const Scratch<T> operand(Left<T>::room(most, depth));
    S before[kCols], added[kCols];
    for (int64_t part; (part = take()) >= 0;) {
      Columns<S>& mine = found[part];
      mine.best.assign(m, none), mine.index.assign(m, 0), mine.sum.assign(sums ? m : 0, 0);
      const int64_t stop = std::min(n, (part + 1) * units / parts * unit);
      for (int64_t first = part * units / parts * unit; first < stop; first += kPanel) {
        const int64_t count = std::min(kPanel, stop - first);
        const Left<T> left{operand.data(), count, depth};
        for (int64_t r = 0; r < count; ++r) left.set_row(r, queries.query(b) + (first + r) * depth);
        S best[kPanel];
        int64_t index[kPanel];
        double sum[kPanel];
        std::fill_n(best, count, none), std::fill_n(index, count, 0), std::fill_n(sum, count, 0.0);
        for (int64_t j = 0; j < packed.blocks(); ++j) {
          const int64_t column = j * kCols, width = std::min(kCols, m - column);
          tile_product(left, 0, count, 0, depth, packed, j, tile.data(), kCols, false);
          const ColumnBest<S> columns_so_far{mine.best.data() + column, mine.index.data() + column,
                                             column_inverse.data() + (sums ? column : 0), added};
          std::copy_n(columns_so_far.best, width, before);
          for (int64_t r = 0; r < count; ++r) {
            S* s = tile.data() + r * kCols;
            const S highest = scale_best(s, width, queries.scales(b)[first + r], keys.scales(b) + column);
            column_best(s, width, int32_t(first + r), columns_so_far);
            if (highest > best[r]) {
              index[r] = column + first_index(s, width, highest);
              if (sums) sum[r] *= std::exp((best[r] - highest) * row_inverse[first + r]);
              best[r] = highest;
            }
          }
          if (!sums) continue;
          std::fill_n(added, width, S(0));
          for (int64_t r = 0; r < count; ++r) {
            sum[r] +=
                sum_exp_both(tile.data() + r * kCols, width, best[r], row_inverse[first + r], columns_so_far);
          }
          S* total = mine.sum.data() + column;
          for (int64_t k = 0; k < width; ++k) {
            const S change = (before[k] - columns_so_far.best[k]) * columns_so_far.inverse_t[k];
            total[k] = total[k] * fast_exp(change) + added[k];
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          rows.best[first + r] = best[r];
          rows.index[first + r] = index[r];
          if (sums) rows.lse[first + r] = best[r] / rows.temperature[first + r] + S(std::log(sum[r]));
        }
      }
    }
    release_tiles<T>();
  });

  for (int64_t j = 0; j < m; ++j) {
    S best = none;
    int64_t index = 0;
    for (const Columns<S>& part : found) {
      if (part.best[j] > best) best = part.best[j], index = part.index[j];
    }
    columns.best[j] = best;
    columns.index[j] = index;
    if (!sums) continue;
    double sum = 0;
    for (const Columns<S>& part : found) {
      sum += part.sum[j] * std::exp((part.best[j] - best) * column_inverse[j]);
    }
    columns.lse[j] = best / columns.temperature[j] + S(std::log(sum));
  }
}

#define INSTANTIATE(T)                                                                                     \
  template Tensor covariance_temperatures<T>(const Features<T>&, const Features<T>&, int64_t);             \
  template bool covariance_is_cheaper<T>(const Features<T>&, const Features<T>&);                          \
  template void both_hops<T>(const Features<T>&, const Features<T>&, int64_t, const RowResults<acc_t<T>>&, \
                             const RowResults<acc_t<T>>&);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastuda
