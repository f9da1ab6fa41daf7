#include "divergence.h"

namespace fastuda {

template <class T>
void divergence_pass(const Features<T>& queries, const Features<T>& keys, int64_t b,
                     const RowResults<acc_t<T>>& out) {
  using S = acc_t<T>;
  const int64_t n = queries.count, m = keys.count, channels = queries.channels;
  Packed<T> packed(channels, m);
  pack_transposed(keys.key(b), channels, nullptr, m, channels, packed);
  share_tasks(blocks_of(n, kRows), [&](const auto& take) {
    const Scratch<S> tile(kRows * kCols);
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t first = task * kRows, count = std::min(kRows, n - first);
      S best[kRows];
      double sum[kRows];
      std::fill_n(best, count, -std::numeric_limits<S>::infinity()), std::fill_n(sum, count, 0.0);
      std::fill_n(out.index + first, count, 0);
      for (int64_t block = 0; block < packed.blocks(); ++block) {
        const int64_t column = block * kCols, width = std::min(kCols, m - column);
        tile_product(count, channels, queries.query(b) + first * channels, channels, packed, block,
                     tile.data(), kCols, false);
        for (int64_t r = 0; r < count; ++r) {
          const S *s = tile.data() + r * kCols, highest = largest(s, width);
          if (highest > best[r]) {
            out.index[first + r] = column + first_index(s, width, highest);
            sum[r] *= std::exp(best[r] - highest);
            best[r] = highest;
          }
          if (out.lse) sum[r] += sum_exp(s, width, best[r], S(1));
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        const S similarity = best[r] + queries.biases(b)[first + r];
        out.best[first + r] = similarity;
        if (!out.lse) continue;
        out.temperature[first + r] = 1;
        out.lse[first + r] = similarity + S(std::log(sum[r]));
      }
    }
    release_tiles<T>();
  });
}

template <class S>
void divergence_aggregate(const Features<S>& x, int64_t b, S alpha, S* out, S* lse) {
  const int64_t n = x.count, channels = x.channels, ld = narrow_ld(channels);
  Packed<S> keys(channels, n);
  pack_transposed(x.key(b), channels, nullptr, n, channels, keys);
  const Scratch<S> values = widened_rows(x.query(b), n, channels);
  share_tasks(blocks_of(n, kRows), [&](const auto& take) {
    const Scratch<S> tile(kRows * kCols), mixed(kRows * ld);
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t first = task * kRows, count = std::min(kRows, n - first);
      const S* rows = x.query(b) + first * channels;
      S best[kRows];
      double sum[kRows];
      std::fill_n(best, count, -std::numeric_limits<S>::infinity()), std::fill_n(sum, count, 0.0);
      std::fill_n(mixed.data(), count * ld, S(0));
      for (int64_t block = 0; block < keys.blocks(); ++block) {
        const int64_t column = block * kCols, width = std::min(kCols, n - column);
        tile_product(count, channels, rows, channels, keys, block, tile.data(), kCols, false);
        for (int64_t r = 0; r < count; ++r) {
          S *s = tile.data() + r * kCols, highest = largest(s, width);
          if (highest > best[r]) {
            const S change = std::exp(best[r] - highest);
            for (int64_t c = 0; c < channels; ++c) mixed.data()[r * ld + c] *= change;
            sum[r] *= change;
            best[r] = highest;
          }
          sum[r] += store_softmax(s, width, best[r], S(1), s);
        }
        plain_product(count, ld, width, tile.data(), kCols, values.data() + column * ld, ld, mixed.data(), ld,
                      true);
      }
      for (int64_t r = 0; r < count; ++r) {
        mix_rows(1 - alpha, rows + r * channels, S(alpha / sum[r]), mixed.data() + r * ld, channels,
                 out + (first + r) * channels);
        lse[first + r] = best[r] + x.biases(b)[first + r] + S(std::log(sum[r]));
      }
    }
    release_tiles<S>();
  });
}

#define INSTANTIATE(T)                                                              \
  template void divergence_pass<T>(const Features<T>&, const Features<T>&, int64_t, \
                                   const RowResults<acc_t<T>>&);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE
template void divergence_aggregate<float>(const Features<float>&, int64_t, float, float*, float*);
template void divergence_aggregate<double>(const Features<double>&, int64_t, double, double*, double*);

}  // namespace fastuda
