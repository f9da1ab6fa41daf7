// Inputs of the similarity kernels: rows as matrix operands, their scales, and row statistics over all keys.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace fastuda {

// Rows of a batch [B, N, C] as operands of the product that computes similarities. Cosine: the raw rows, with
// their inverse norms as scales, so that bf16 products are exact. KL: probabilities as queries, their
// logarithms as keys, and minus the entropy as the bias of the query.
template <class T>
struct Features {
  using S = acc_t<T>;
  Tensor queries, keys;      // [B, N, channels] of T, contiguous; channels even for bf16
  Tensor scale, norm, bias;  // [B, N] of S: scale and norm of queries and keys (KL: ones), bias of queries
  int64_t count, channels;

  Features(const Tensor& x, bool kl);
  const T* query(int64_t b) const { return queries.template const_data_ptr<T>() + b * count * channels; }
  const T* key(int64_t b) const { return keys.template const_data_ptr<T>() + b * count * channels; }
  const S* scales(int64_t b) const { return scale.template const_data_ptr<S>() + b * count; }
  const S* biases(int64_t b) const { return bias.template const_data_ptr<S>() + b * count; }
};

// Calls f with a T() of the element type of the products.
template <class F>
auto with_element(const Tensor& x, bool kl, F&& f) {
  if (x.scalar_type() == at::kDouble) return f(double());
  if (x.scalar_type() == at::kBFloat16 && !kl && has_bf16_gemm()) return f(BFloat16());
  return f(float());
}

inline bool is_kl(c10::string_view similarity) {
  TORCH_CHECK_VALUE(similarity == "cosine" || similarity == "kl", "similarity must be cosine or kl");
  return similarity == "kl";
}

// x without padded channels, in the type of the input; never a view.
Tensor as_result(const Tensor& x, int64_t channels, at::ScalarType type);

// Results over all keys for every query row; lse and temperature are null if they are not requested.
template <class S>
struct RowResults {
  int64_t* index;
  S *best, *temperature, *lse;
};

// Number of rows of similarities that a thread holds at a time, if a column takes that many bytes: at most
// kPanel, and as many as keep the rows of all threads within 64 MiB, but at least 16.
int64_t panel_rows(int64_t rows, int64_t columns, int64_t bytes, int64_t channels);

// Similarities of rows [first, first + count) to all keys into s, of leading dimension padded(keys.count),
// and their statistics; operand has room for the rows.
template <class T>
void similarity_rows(const Features<T>& queries, const Features<T>& keys, const Packed<T>& packed, int64_t b,
                     int64_t first, int64_t count, T* operand, acc_t<T>* s,
                     RowStatistics<acc_t<T>>* statistics);

// One product: argmax (lowest index), best similarity, temperature and log-sum-exp of the rows.
template <class T>
void row_pass(const Features<T>& queries, const Features<T>& keys, int64_t b,
              const RowResults<acc_t<T>>& out);

// The temperatures of all rows of a cosine similarity from the covariance of the keys, t_i^2 = x_i . Cov(y)
// x_i, without a product of all rows with all keys.
template <class T>
Tensor covariance_temperatures(const Features<T>& queries, const Features<T>& keys, int64_t b);

// Whether these, for both sides, cost less than the product that they replace.
template <class T>
bool covariance_is_cheaper(const Features<T>& queries, const Features<T>& keys);

// One product for both hops of a cosine similarity: argmax (lowest index) and best of the rows and of the
// columns, and if requested their log-sum-exps, for which the temperatures must be given.
template <class T>
void both_hops(const Features<T>& queries, const Features<T>& keys, int64_t b,
               const RowResults<acc_t<T>>& rows, const RowResults<acc_t<T>>& columns);

}  // namespace fastuda
