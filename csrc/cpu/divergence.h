// The KL similarity, whose features are only as wide as there are classes. Products cost no more than sweeps,
// so tiles are multiplied in place, and a temperature of 1 needs no row of similarities.
#pragma once

#include "similarity.h"
#include "tasks.h"

namespace fastuda {

// Argmax (lowest index), best similarity and, if requested, log-sum-exp of the rows, at temperature 1.
template <class T>
void divergence_pass(const Features<T>& queries, const Features<T>& keys, int64_t b,
                     const RowResults<acc_t<T>>& out);

// (1 - alpha) x + alpha softmax(D(x, x)) x of one image, and the log-sum-exps of its rows.
template <class S>
void divergence_aggregate(const Features<S>& x, int64_t b, S alpha, S* out, S* lse);

// Rows [count, channels] of queries against all keys, and the gradients from the terms of the tiles.
template <class S>
struct DivergenceBackward {
  const S *rows, *grads;  // grads [count, channels] of the weighted sums, or null
  int64_t count;
  S *row_grad, *key_grad;  // of the probabilities and the logarithms: [count, channels], [keys, channels]
  S* value_grad;           // of the values: [keys, channels], or null

  // tile(first, rows, column, width, z, w) turns the products z = rows . keys and w = grads . values, of
  // leading dimension kCols, into the gradient of the similarities and the weights.
  template <class Tile>
  void run(const Features<S>& keys, int64_t b, const Tile& tile) const;
};

// Columns of a narrow right-hand side or result: rounded up to whole vectors of eight.
inline int64_t narrow_ld(int64_t channels) { return round_up(channels, 8); }

// rows [count, channels] with zeros up to the leading dimension.
template <class S>
Scratch<S> widened_rows(const S* rows, int64_t count, int64_t channels) {
  const int64_t ld = narrow_ld(channels);
  Scratch<S> made = Scratch<S>::zeros(count * ld);
  for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * channels, channels, made.data() + i * ld);
  return made;
}

// rows [count, channels] as one [channels, kRows] after another.
template <class S>
Scratch<S> transposed_rows(const S* rows, int64_t count, int64_t channels) {
  Scratch<S> made(channels * round_up(count, kRows));
  for (int64_t i = 0; i < count; ++i) {
    S* to = made.data() + i / kRows * kRows * channels + i % kRows;
    for (int64_t c = 0; c < channels; ++c) to[c * kRows] = rows[i * channels + c];
  }
  return made;
}

template <class S>
template <class Tile>
void DivergenceBackward<S>::run(const Features<S>& keys, int64_t b, const Tile& tile) const {
  constexpr int64_t kParts = 8;  // largest number of parts of the keys, whose sums are added in order
  const int64_t channels = keys.channels, m = keys.count, ld = narrow_ld(channels);
  Packed<S> keys_t(channels, m), values_t(channels, grads ? m : 0);
  pack_transposed(keys.key(b), channels, nullptr, m, channels, keys_t);
  if (grads) pack_transposed(keys.query(b), channels, nullptr, m, channels, values_t);
  const Scratch<S> key_rows = widened_rows(keys.key(b), m, channels);
  const Scratch<S> rows_t = transposed_rows(rows, count, channels);
  const Scratch<S> grads_t = transposed_rows(grads, grads ? count : 0, channels);
  const int64_t blocks = keys_t.blocks(), parts = std::min(kParts, blocks);
  std::vector<Scratch<S>> sums(parts);

  share_tasks(parts, [&](const auto& take) {
    const Scratch<S> z(kRows * kCols), w(kRows * kCols), of_key(channels * kCols), of_value(channels * kCols);
    const auto put = [&](const Scratch<S>& from, int64_t column, int64_t width, S* to) {
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t c = 0; c < channels; ++c) to[(column + j) * channels + c] = from.data()[c * kCols + j];
      }
    };
    for (int64_t part; (part = take()) >= 0;) {
      const Scratch<S>& of_rows = sums[part] = Scratch<S>(count * ld);
      std::fill_n(of_rows.data(), count * ld, S(0));
      for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const int64_t column = block * kCols, width = std::min(kCols, m - column),
                      whole = keys_t.width(block);
        for (int64_t first = 0; first < count; first += kRows) {
          const int64_t taken = std::min(kRows, count - first);
          tile_product(taken, channels, rows + first * channels, channels, keys_t, block, z.data(), kCols,
                       false);
          if (grads) {
            tile_product(taken, channels, grads + first * channels, channels, values_t, block, w.data(),
                         kCols, false);
          }
          tile(first, taken, column, width, z.data(), w.data());
          plain_product(taken, ld, width, z.data(), kCols, key_rows.data() + column * ld, ld,
                        of_rows.data() + first * ld, ld, true);
          plain_product(channels, whole, taken, rows_t.data() + first * channels, kRows, z.data(), kCols,
                        of_key.data(), kCols, first > 0);
          if (grads) {
            plain_product(channels, whole, taken, grads_t.data() + first * channels, kRows, w.data(), kCols,
                          of_value.data(), kCols, first > 0);
          }
        }
        put(of_key, column, width, key_grad);
        if (grads) put(of_value, column, width, value_grad);
      }
    }
    release_tiles<S>();
  });
  at::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      S* to = row_grad + i * channels;
      std::copy_n(sums[0].data() + i * ld, channels, to);
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t c = 0; c < channels; ++c) to[c] += sums[part].data()[i * ld + c];
      }
    }
  });
}

}  // namespace fastuda
