// Row sweeps of depthwise_conv2d, one clone per instruction set.
#include "depthwise_conv2d.h"
#include "widen.h"

namespace fastuda {

namespace {

// 64 bytes of sums, in one register of AVX-512 or in two of AVX2.
template <class S>
struct Lanes {
  static constexpr int64_t count = 64 / sizeof(S);
  typedef S type __attribute__((vector_size(64)));
};
template <class S>
using lanes_t = typename Lanes<S>::type;

FASTUDA_INLINE void load_lanes(const float* from, lanes_t<float>& x) { std::memcpy(&x, from, sizeof(x)); }
FASTUDA_INLINE void load_lanes(const double* from, lanes_t<double>& x) { std::memcpy(&x, from, sizeof(x)); }
FASTUDA_INLINE void load_lanes(const BFloat16* from, lanes_t<float>& x) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Word __attribute__((vector_size(64)));
  Half half;
  std::memcpy(&half, from, sizeof(half));
  const Word bits = __builtin_convertvector(half, Word) << 16;
  std::memcpy(&x, &bits, sizeof(x));
}

template <class S>
FASTUDA_INLINE void store_lanes(const lanes_t<S>& x, S* to) {
  std::memcpy(to, &x, sizeof(x));
}
template <class S>
FASTUDA_INLINE void store_lanes(const lanes_t<float>& x, BFloat16* to) {
  float each[Lanes<float>::count];
  std::memcpy(each, &x, sizeof(x));
#pragma omp simd
  for (int64_t j = 0; j < Lanes<float>::count; ++j) narrow(each[j], to + j);
}

// sum += a b
template <class T, class Sums>
FASTUDA_INLINE void add_product(const T* a, const Sums& b, Sums& sum) {
  Sums x;
  load_lanes(a, x);
  sum += x * b;
}

// `near` pixels from the i-th of the run on, and the channels of `wide` registers from c on: a weight is read
// once for all these pixels.
template <int near, int wide, class T, class S>
FASTUDA_INLINE void sum_block(const PixelRun<T, S>& run, int64_t i, int64_t c, const S* bias, T* out) {
  constexpr int64_t step = Lanes<S>::count;
  lanes_t<S> sums[near][wide] = {};
  if (bias) {
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) load_lanes(bias + c + v * step, sums[p][v]);
    }
  }
  for (int64_t t = 0; t < run.taps; ++t) {
    const T* row = run.rows[t] + i * run.from_step + c;
    const S* weight = run.weights[t] + c;
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      lanes_t<S> w;
      load_lanes(weight + v * step, w);
#pragma GCC unroll 4
      for (int p = 0; p < near; ++p) add_product(row + p * run.from_step + v * step, w, sums[p][v]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < near; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      store_lanes<S>(sums[p][v], out + (i + p) * run.to_step + c + v * step);
    }
  }
}

template <int near, class T, class S>
FASTUDA_INLINE void sum_channels(const PixelRun<T, S>& run, int64_t i, int64_t c, int64_t end, const S* bias,
                                 T* out) {
  constexpr int64_t step = Lanes<S>::count;
  for (; c + 2 * step <= end; c += 2 * step) sum_block<near, 2>(run, i, c, bias, out);
  for (; c + step <= end; c += step) sum_block<near, 1>(run, i, c, bias, out);
  for (; c < end; ++c) {
    for (int64_t p = i; p < i + near; ++p) {
      S sum = bias ? bias[c] : S(0);
      for (int64_t t = 0; t < run.taps; ++t) {
        sum += widen(run.rows[t][p * run.from_step + c]) * run.weights[t][c];
      }
      narrow(sum, out + p * run.to_step + c);
    }
  }
}

// Few channels at a time, so that inputs of several taps are still in the first-level cache. All channels if
// the pixels are a power of two apart, because they would fall into the same few cache sets.
template <class T, class S>
FASTUDA_INLINE void sum_run_body(const PixelRun<T, S>& run, int64_t channels, const S* bias, T* out) {
  constexpr int64_t few = 2 * Lanes<S>::count;
  const int64_t block = run.from_step * int64_t(sizeof(T)) % 512 ? few : channels;
  for (int64_t c = 0; c < channels; c += block) {
    const int64_t end = std::min(c + block, channels);
    int64_t i = 0;
    for (; i + 3 <= run.pixels; i += 3) sum_channels<3>(run, i, c, end, bias, out);
    for (; i < run.pixels; ++i) sum_channels<1>(run, i, c, end, bias, out);
  }
}

template <class T, class S>
FASTUDA_INLINE void widen_body(const T* x, int64_t step, int64_t pixels, int64_t channels, S* to) {
  for (int64_t i = 0; i < pixels; ++i, x += step, to += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[c] = widen(x[c]);
  }
}

// The channels of `wide` registers from c on, of `taps` rows from t on: a gradient is read once for all rows.
template <int taps, int wide, class T, class S>
FASTUDA_INLINE void product_block(const T* g, int64_t step_g, const MetRows<S>& met, int64_t t, int64_t c,
                                  int64_t count) {
  constexpr int64_t step = Lanes<S>::count;
  lanes_t<S> sums[taps][wide];
  const S* rows[taps];
#pragma GCC unroll 4
  for (int k = 0; k < taps; ++k) {
    rows[k] = met.rows[t + k] + c;
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) load_lanes(met.sums[t + k] + c + v * step, sums[k][v]);
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      lanes_t<S> x;
      load_lanes(g + i * step_g + c + v * step, x);
#pragma GCC unroll 4
      for (int k = 0; k < taps; ++k) add_product(rows[k] + i * met.step + v * step, x, sums[k][v]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < taps; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) store_lanes<S>(sums[k][v], met.sums[t + k] + c + v * step);
  }
}

template <int taps, class T, class S>
FASTUDA_INLINE void product_channels(const T* g, int64_t step_g, const MetRows<S>& met, int64_t t,
                                     int64_t count, int64_t channels) {
  constexpr int64_t step = Lanes<S>::count;
  int64_t c = 0;
  for (; c + 2 * step <= channels; c += 2 * step) {
    product_block<taps, 2>(g, step_g, met, t, c, count);
  }
  for (; c + step <= channels; c += step) product_block<taps, 1>(g, step_g, met, t, c, count);
  for (; c < channels; ++c) {
    for (int k = 0; k < taps; ++k) {
      const S* row = met.rows[t + k] + c;
      S sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += widen(g[i * step_g + c]) * row[i * met.step];
      met.sums[t + k][c] += sum;
    }
  }
}

template <class T, class S>
FASTUDA_INLINE void products_body(const T* g, int64_t step_g, const MetRows<S>& met, int64_t count,
                                  int64_t channels) {
  int64_t t = 0;
  for (; t + 3 <= met.taps; t += 3) product_channels<3>(g, step_g, met, t, count, channels);
  for (; t < met.taps; ++t) product_channels<1>(g, step_g, met, t, count, channels);
}

}  // namespace

// target_clones does not apply to templates, hence one named function per element type.
#define DEPTHWISE_SWEEPS(T, S, SUFFIX, CLONES)                                                           \
  CLONES static void run_##SUFFIX(const PixelRun<T, S>& run, int64_t channels, const S* bias, T* out) {  \
    sum_run_body(run, channels, bias, out);                                                              \
  }                                                                                                      \
  CLONES static void widen_##SUFFIX(const T* x, int64_t step, int64_t pixels, int64_t channels, S* to) { \
    widen_body(x, step, pixels, channels, to);                                                           \
  }                                                                                                      \
  CLONES static void products_##SUFFIX(const T* g, int64_t step, const MetRows<S>& met, int64_t count,   \
                                       int64_t channels) {                                               \
    products_body(g, step, met, count, channels);                                                        \
  }                                                                                                      \
  template <>                                                                                            \
  void sum_run(const PixelRun<T, S>& run, int64_t channels, const S* bias, T* out) {                     \
    run_##SUFFIX(run, channels, bias, out);                                                              \
  }                                                                                                      \
  template <>                                                                                            \
  void widen_pixels(const T* x, int64_t step, int64_t pixels, int64_t channels, S* to) {                 \
    widen_##SUFFIX(x, step, pixels, channels, to);                                                       \
  }                                                                                                      \
  template <>                                                                                            \
  void add_products(const T* g, int64_t step, const MetRows<S>& met, int64_t count, int64_t channels) {  \
    products_##SUFFIX(g, step, met, count, channels);                                                    \
  }
DEPTHWISE_SWEEPS(float, float, f, FASTUDA_CLONES)
DEPTHWISE_SWEEPS(BFloat16, float, h, FASTUDA_CLONES)
DEPTHWISE_SWEEPS(double, double, d, )
#undef DEPTHWISE_SWEEPS

}  // namespace fastuda
