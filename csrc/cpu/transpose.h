// Transposition of small squares of 32-bit words, in registers if the compiler supports vectors.
#pragma once

#include "../common.h"

namespace fastuda {

constexpr int64_t kSquare = 8;

// out[c * ldo + r] = in[r][c] of 8 x 8 words of 32 bits.
template <class Word>
FASTUDA_INLINE void transpose_square(const Word* const* in, Word* out, int64_t ldo) {
  static_assert(sizeof(Word) == 4);
#if defined(__GNUC__) && !defined(__clang__)
  typedef int32_t Words __attribute__((vector_size(32)));
  Words a[8], b[8];
  for (int r = 0; r < 8; ++r) std::memcpy(&a[r], in[r], 32);
  constexpr Words low{0, 8, 1, 9, 4, 12, 5, 13}, high{2, 10, 3, 11, 6, 14, 7, 15};
  for (int r = 0; r < 8; r += 2) {
    b[r] = __builtin_shuffle(a[r], a[r + 1], low);
    b[r + 1] = __builtin_shuffle(a[r], a[r + 1], high);
  }
  constexpr Words low_pair{0, 1, 8, 9, 4, 5, 12, 13}, high_pair{2, 3, 10, 11, 6, 7, 14, 15};
  for (int r = 0; r < 8; r += 4) {
    for (int k = 0; k < 2; ++k) {
      a[r + 2 * k] = __builtin_shuffle(b[r + k], b[r + k + 2], low_pair);
      a[r + 2 * k + 1] = __builtin_shuffle(b[r + k], b[r + k + 2], high_pair);
    }
  }
  constexpr Words low_half{0, 1, 2, 3, 8, 9, 10, 11}, high_half{4, 5, 6, 7, 12, 13, 14, 15};
  for (int r = 0; r < 4; ++r) {
    b[r] = __builtin_shuffle(a[r], a[r + 4], low_half);
    b[r + 4] = __builtin_shuffle(a[r], a[r + 4], high_half);
  }
  for (int r = 0; r < 8; ++r) std::memcpy(out + r * ldo, &b[r], 32);
#else
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 8; ++c) out[c * ldo + r] = in[r][c];
  }
#endif
}

}  // namespace fastuda
