// Registers the CUDA kernels with torch through its stable ABI: one build works with torch 2.11 and later.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void check(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", fastuda_cuda_error(code)); }

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor floats(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)); }

}  // namespace
