// Helpers for tensors that the kernels need.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "common.h"

namespace fastuda {

using at::Tensor;

// A sum in the type of x; infinite if the type cannot hold it.
inline Tensor scalar_result(double value, const Tensor& x) {
  return at::full({}, value, x.options().dtype(at::kDouble)).to(x.scalar_type());
}

inline at::ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace fastuda
