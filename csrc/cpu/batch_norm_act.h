// Row sweeps of batch_norm_act; rows are [rows, words], contiguous. A word is one value, or two of bfloat16
// (uint32_t), which need half as many operations to read and write. Arrays over columns hold [words] for the
// first value of each word, then [words] for the second.
#pragma once

#include "../common.h"

namespace fastuda {

// Values of a word.
template <class Word>
constexpr int64_t values_of = std::is_same_v<Word, uint32_t> ? 2 : 1;

// The mean of every column and the sum of squared differences from it, in two passes.
template <class Word, class S>
void column_moments(const Word* x, int64_t rows, int64_t words, S* mean, S* squares);

// y = clamp(scale x + shift, low, high), column by column.
template <class S>
struct ClampedRows {
  int64_t rows, words;
  const S *scale, *shift;
  S low, high;
};

template <class Word, class S>
void clamp_rows(const Word* x, const ClampedRows<S>& y, Word* out);

// Per column sum += sum of g and along += sum of g (x - mean), where g is grad, or 0 where y is clamped.
template <class Word, class S>
void column_gradients(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean, S* sum,
                      S* along);

// out = scale g + slope (x - mean) + constant
template <class Word, class S>
void gradient_rows(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean, const S* slope,
                   const S* constant, Word* out);

}  // namespace fastuda
