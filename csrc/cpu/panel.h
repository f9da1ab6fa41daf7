// Panels of kRows rows of features and their products with a packed right-hand side.
#pragma once

#include "gemm.h"

namespace fastuda {

// Calls f with a T() of the type of the features; float16 is widened as a whole, see readable().
template <class F>
void with_rows(const Tensor& features, F&& f) {
  if (features.scalar_type() == at::kDouble) {
    f(double());
  } else if (features.scalar_type() == at::kBFloat16) {
    f(BFloat16());
  } else {
    f(float());
  }
}
inline Tensor readable(const Tensor& features) {
  return (features.scalar_type() == at::kHalf ? features.to(at::kFloat) : features).contiguous();
}
// [B, C, h, w] -> [B, h, w, C]; a view for channels-last features
inline Tensor channel_rows(const Tensor& features) { return readable(features.permute({0, 2, 3, 1})); }

template <class S>
Scratch<S> panel_of(int64_t columns) {
  return Scratch<S>::zeros(kRows * columns);
}

// a [kRows, depth] . b -> out [kRows, b.columns]; always whole panels, because every size has its own
// generated code.
template <class S>
void product(const Scratch<S>& a, int64_t lda, const Packed<S>& b, const Scratch<S>& out) {
  for (int64_t block = 0; block < b.blocks(); ++block) {
    tile_product<S>(kRows, b.depth, a.data(), lda, b, block, out.data() + block * kCols, b.columns, false);
  }
}

}  // namespace fastuda
