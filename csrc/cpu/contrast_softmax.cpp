// contrast_softmax: rows stay in the first-level caches between the three sweeps (statistics, exponentials,
// scaling). The result bypasses the caches, because nothing reads it soon.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <torch/library.h>

#include "../tensors.h"
#include "scratch.h"
#include "tile.h"

namespace fastuda {

namespace {

// Copies a finished row to memory without reading its old contents into the cache.
void stream_out(const void* from, void* to, size_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const size_t head = std::min(bytes, (16 - reinterpret_cast<uintptr_t>(target) % 16) % 16);
  std::memcpy(target, source, head);
  size_t at = head;
  for (; at + 64 <= bytes; at += 64) {
    for (size_t k = 0; k < 64; k += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at + k)));
    }
  }
  std::memcpy(target + at, source + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}

// The same with a factor.
void stream_scaled(const float* from, float scale, float* to, int64_t n) {
  int64_t j = 0;
#if defined(__SSE2__)
  for (; j < n && reinterpret_cast<uintptr_t>(to + j) % 16; ++j) to[j] = from[j] * scale;
  const __m128 factor = _mm_set1_ps(scale);
  for (; j + 16 <= n; j += 16) {
    for (int64_t k = j; k < j + 16; k += 4) {
      _mm_stream_ps(to + k, _mm_mul_ps(_mm_loadu_ps(from + k), factor));
    }
  }
#endif
  for (; j < n; ++j) to[j] = from[j] * scale;
}

// Prefetches memory for the next row while this one is computed.
template <class T>
void prefetch(const T* data, int64_t count) {
#if defined(__GNUC__)
  for (int64_t j = 0; j < count; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + j, 0, 2);
#endif
}

constexpr int64_t kStep = 1024;  // elements between prefetches for the next row

void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

std::tuple<Tensor, Tensor> contrast_softmax_fwd(const Tensor& input, double eps) {
  const Tensor x = (input.scalar_type() == at::kHalf ? input.to(at::kFloat) : input).contiguous();
  const int64_t m = x.size(-1), rows = x.numel() / m;
  Tensor y = empty_result(x.sizes(), x.options());
  Tensor inverse = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(statistics_type(x)));
  const auto run = [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    S* inv = inverse.mutable_data_ptr<S>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> e(m);
      std::vector<T> out(m);
      for (int64_t i = begin; i < end; ++i) {
        RowStatistics<S> statistics;
        statistics.shift = mean_of(from + i * m, std::min<int64_t>(m, 256));
        row_statistics(from + i * m, m, statistics);
        const S t = statistics.deviation(m) + S(eps);
        inv[i] = 1 / t;
        const T *row = from + i * m, *next = i + 1 < end ? row + m : nullptr;
        S sum = 0;
        for (int64_t j = 0; j < m; j += kStep) {
          const int64_t count = std::min(kStep, m - j);
          if (next) prefetch(next + j, count);
          sum += exp_row(row + j, count, statistics.best, 1 / t, e.data() + j);
        }
        if constexpr (std::is_same_v<T, float>) {
          stream_scaled(e.data(), 1 / sum, to + i * m, m);
        } else {
          scale_to(e.data(), 1 / sum, m, out.data());
          stream_out(out.data(), to + i * m, m * sizeof(T));
        }
      }
      finish_stream();
    });
  };
  if (x.scalar_type() == at::kDouble) {
    run(double());
  } else if (x.scalar_type() == at::kBFloat16) {
    run(BFloat16());
  } else {
    run(float());
  }
  return {y.to(input.scalar_type()), inverse};
}

Tensor contrast_softmax_bwd(const Tensor& grad, const Tensor& y, const Tensor& inverse) {
  const bool half = y.scalar_type() == at::kHalf;
  const Tensor g = (half ? grad.to(at::kFloat) : grad.to(y.scalar_type())).contiguous();
  const Tensor p = (half ? y.to(at::kFloat) : y).contiguous(), inv = inverse.contiguous();
  const int64_t m = y.size(-1), rows = y.numel() / m;
  Tensor result = empty_result(p.sizes(), p.options());
  const auto run = [&](auto element) {
    using T = decltype(element);
    using S = acc_t<T>;
    const T *gs = g.const_data_ptr<T>(), *ps = p.const_data_ptr<T>();
    const S* scale = inv.const_data_ptr<S>();
    T* to = result.mutable_data_ptr<T>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> out(m);
      for (int64_t i = begin; i < end; ++i) {
        const T *grad_row = gs + i * m, *row = ps + i * m;
        const S mean = inner(grad_row, row, m);
        for (int64_t j = 0; j < m; j += kStep) {
          const int64_t count = std::min(kStep, m - j);
          if (i + 1 < end) prefetch(grad_row + m + j, count), prefetch(row + m + j, count);
          softmax_gradient(grad_row + j, row + j, mean, scale[i], count, out.data() + j);
        }
        stream_out(out.data(), to + i * m, m * sizeof(T));
      }
      finish_stream();
    });
  };
  if (p.scalar_type() == at::kDouble) {
    run(double());
  } else if (p.scalar_type() == at::kBFloat16) {
    run(BFloat16());
  } else {
    run(float());
  }
  return result.to(y.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) {
  m.impl("contrast_softmax_fwd.cpu", &contrast_softmax_fwd);
  m.impl("contrast_softmax_bwd.cpu", &contrast_softmax_bwd);
}

}  // namespace fastuda
