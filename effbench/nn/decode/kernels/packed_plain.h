// Products of packed rows on any machine.

#pragma once

#include "packed.h"

namespace {

constexpr int64_t block_place(int64_t, int64_t i) { return i; }

inline void placed(int64_t, const int16_t* plain, int64_t start, int16_t* ints) {
  std::memcpy(ints + start, plain, 64 * sizeof(int16_t));
}

template <int B>
void factors(const Matrix& m, int64_t row, int64_t K, const Packable* x,
             float (*by)[kMostBlocks + 8], float* less) {
  const int64_t blocks = K / kBlock;
  const int64_t first = row * ((K + m.group - 1) / m.group);
  float scales[kMostBlocks];
  if (m.bits == kNF4) nf4_scales(m, row, K, scales);
  for (int b = 0; b < B; ++b) {
    less[b] = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      float scale = scales[i], zero = 0;
      if (m.bits != kNF4) group_scale(m, first + i * kBlock / m.group, &scale, &zero);
      by[b][i] = scale * x[b].scales[i];
      less[b] += (m.planes == kShifts ? -zero : scale * zero) * x[b].totals[i];
    }
  }
}

// Code i of a row, or what it stands for.
template <int64_t kBits>
inline int32_t weight_at(const uint8_t* codes, int64_t i) {
  if constexpr (kBits == kNF4) return kLevels[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
  else return code_at(codes, i, kBits);
}

template <int64_t kBits, int B>
__attribute__((noinline)) void rows(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x,
                                    float* sums, int64_t stride) {
  constexpr int64_t kWide = kBits == kNF4 ? 4 : kBits;
  for (int64_t i = row; i < row + count; ++i, sums += stride) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.weight) + i * K * kWide / 8;
    float by[B][kMostBlocks + 8], less[B];
    factors<B>(m, i, K, x, by, less);
    for (int b = 0; b < B; ++b) sums[b] = -less[b];
    for (int64_t block = 0; block < K / kBlock; ++block) {
      int32_t own[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) own[j] = weight_at<kBits>(codes, block * kBlock + j);
      for (int b = 0; b < B; ++b) {
        int64_t sum = 0;
        for (int64_t j = 0; j < kBlock; ++j) sum += own[j] * x[b].ints[block * kBlock + j];
        sums[b] += float(sum) * by[b][block];
      }
    }
  }
}

}  // namespace
