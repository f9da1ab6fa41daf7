// Packing of right-hand sides and the probe of the bf16 matrix unit.
#include "gemm.h"

#include <ATen/Context.h>

#include "transpose.h"

namespace fastuda {

namespace {

// One block of a transposition of words: a float, a pair of bf16, or a double.
template <class Word>
void transpose_block(const Word* const* rows, int64_t count, int64_t words, Word* out, int64_t width) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t w = 0; w < words; ++w) out[w * width + j] = rows[j][w];
  }
  for (int64_t w = 0; w < words; ++w) std::fill(out + w * width + count, out + (w + 1) * width, Word(0));
}

// Eight rows at a time, as many streams as hardware prefetchers can follow.
FASTUDA_CLONES void transpose_words(const int32_t* const* rows, int64_t count, int64_t words, int32_t* out,
                                    int64_t width) {
  int64_t j = 0;
  for (; j + kSquare <= count; j += kSquare) {
    int64_t w = 0;
    const int32_t* from[kSquare];
    std::copy_n(rows + j, kSquare, from);
    for (; w + kSquare <= words; w += kSquare) {
      transpose_square(from, out + w * width + j, width);
      for (const int32_t*& row : from) row += kSquare;
    }
    for (; w < words; ++w) {
      for (int64_t k = j; k < j + kSquare; ++k) out[w * width + k] = rows[k][w];
    }
  }
  for (; j < count; ++j) {
    for (int64_t w = 0; w < words; ++w) out[w * width + j] = rows[j][w];
  }
  for (int64_t w = 0; w < words; ++w) std::fill(out + w * width + count, out + (w + 1) * width, 0);
}
template <>
void transpose_block(const int32_t* const* rows, int64_t count, int64_t words, int32_t* out, int64_t width) {
  transpose_words(rows, count, words, out, width);
}

// Pairs (low[j], high[j]) of 16-bit elements, as the matrix unit reads them.
FASTUDA_CLONES void interleave(const uint16_t* low, const uint16_t* high, int64_t n, uint32_t* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = uint32_t(low[j]) | uint32_t(high[j]) << 16;
}

bool probe_bf16() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#else
  return false;
#endif
  try {
    constexpr int64_t n = 32;
    std::vector<BFloat16> a(n * n, BFloat16(0.5f)), b(n * n, BFloat16(2.0f));
    std::vector<float> c(n * n, 0.0f);
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, a.data(), b.data(), c.data(), true);
    at::native::cpublas::brgemm_release(true);
    return std::all_of(c.begin(), c.end(), [](float x) { return x == n; });
  } catch (const c10::Error&) {
    return false;
  }
}

bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

}  // namespace

template <class T>
int64_t strip_columns(int64_t depth) {
  static const int64_t narrow = has_avx512() ? 64 : 32;  // the width with the fastest generated code
  return std::is_same_v<T, float> && depth >= kUnit ? narrow : kCols;
}

bool has_bf16_gemm() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool usable = probe_bf16();
  return usable;
}

template <class T>
void pack_transposed(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
                     const Packed<T>& out) {
  using Word = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  at::parallel_for(0, out.strips(), kCols / out.across, [&](int64_t begin, int64_t end) {
    std::vector<const Word*> row(out.across);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * out.across, taken = std::min(out.across, count - first);
      for (int64_t j = 0; j < taken; ++j) {
        row[j] = reinterpret_cast<const Word*>(rows + (index ? index[first + j] : first + j) * ld);
      }
      transpose_block(row.data(), taken, channels / kPair<T>, reinterpret_cast<Word*>(out.strip(strip)),
                      out.strip_width(strip));
    }
  });
}

template <class T>
void pack_rows(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
               const Packed<T>& out) {
  constexpr int64_t pair = kPair<T>;
  at::parallel_for(0, out.depth / pair, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t strip = 0; strip < out.strips(); ++strip) {
        const int64_t width = out.strip_width(strip), column = strip * out.across;
        const int64_t taken = std::min(width, channels - column);
        T* to = out.strip(strip) + k * pair * width;
        if constexpr (pair == 2) {
          if (k * pair + 1 < count) {
            const auto half = [&](int64_t at) {
              const T* row = rows + (index ? index[at] : at) * ld + column;
              return reinterpret_cast<const uint16_t*>(row);
            };
            interleave(half(k * pair), half(k * pair + 1), taken, reinterpret_cast<uint32_t*>(to));
            std::fill(to + taken * pair, to + width * pair, T(0));
            continue;
          }
        }
        for (int64_t p = 0; p < pair; ++p) {
          const int64_t at = k * pair + p;
          if (at >= count) {
            for (int64_t j = 0; j < width; ++j) to[j * pair + p] = T(0);
            continue;
          }
          const T* from = rows + (index ? index[at] : at) * ld + column;
          for (int64_t j = 0; j < taken; ++j) to[j * pair + p] = from[j];
          for (int64_t j = taken; j < width; ++j) to[j * pair + p] = T(0);
        }
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                     \
  template int64_t strip_columns<T>(int64_t);                                                              \
  template void pack_transposed<T>(const T*, int64_t, const int64_t*, int64_t, int64_t, const Packed<T>&); \
  template void pack_rows<T>(const T*, int64_t, const int64_t*, int64_t, int64_t, const Packed<T>&);
INSTANTIATE(BFloat16)
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastuda
