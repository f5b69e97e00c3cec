// Products of one row of a dense matrix and some vectors.
//
// A row is read from its beginning to its end before the next one is, so that a thread reads its
// part of a matrix as one stream: several rows side by side are several streams, and slower. The
// order of the sums is the same for any number of vectors.

#pragma once

#include <type_traits>

#include "numbers.h"

namespace {

constexpr int kSums = 4;  // registers of partial sums of each product
#if defined(__AVX512F__)
constexpr int kBatch = 4;  // vectors that share one pass over a row
#else
constexpr int kBatch = 2;
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_BF16 1
#endif

// What vectors are held as while they are multiplied.
template <typename T>
struct Operand {
  using type = float;
};
#if defined(NATIVE_BF16)
template <>
struct Operand<bf16> {
  using type = bf16;
};
#endif

template <typename T>
void as_operand(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value(from[i]);
}
inline void as_operand(const bf16* from, bf16* to, int64_t n) {
  std::memcpy(to, from, size_t(n) * sizeof(bf16));
}

// sums[b] = <row, x[b]> for B vectors x of K numbers, `stride` apart.
template <typename T, int B>
struct Dot {
  static void run(const T* row, const float* x, int64_t stride, int64_t K, float* sums) {
    constexpr int64_t L = Lanes::kCount;
    Lanes acc[B][kSums];
    for (int b = 0; b < B; ++b)
      for (int a = 0; a < kSums; ++a) acc[b][a] = Lanes::zero();
    int64_t k = 0;
    for (; k + kSums * L <= K; k += kSums * L) {
#pragma GCC unroll 4
      for (int a = 0; a < kSums; ++a) {
        const Lanes w = Lanes::load(row + k + a * L);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
          acc[b][a] = acc[b][a].plus(w, Lanes::load(x + b * stride + k + a * L));
      }
    }
    for (; k + L <= K; k += L) {
      const Lanes w = Lanes::load(row + k);
      for (int b = 0; b < B; ++b) acc[b][0] = acc[b][0].plus(w, Lanes::load(x + b * stride + k));
    }
    for (int b = 0; b < B; ++b) {
      float rest = 0;
      for (int64_t i = k; i < K; ++i) rest += value(row[i]) * x[b * stride + i];
      sums[b] = ((acc[b][0] + acc[b][1]) + (acc[b][2] + acc[b][3])).sum() + rest;
    }
  }
};

#if defined(NATIVE_BF16)

template <int B>
struct Dot<bf16, B> {
  static void run(const bf16* row, const bf16* x, int64_t stride, int64_t K, float* sums) {
    constexpr int64_t L = 32;
    __m512 acc[B][kSums];
    for (int b = 0; b < B; ++b)
      for (int a = 0; a < kSums; ++a) acc[b][a] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + kSums * L <= K; k += kSums * L) {
#pragma GCC unroll 4
      for (int a = 0; a < kSums; ++a) {
        const __m512i w = _mm512_loadu_si512(row + k + a * L);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
          acc[b][a] = added(acc[b][a], w, _mm512_loadu_si512(x + b * stride + k + a * L));
      }
    }
    for (; k < K; k += L) {
      const __mmask32 mask =
          K - k >= L ? ~__mmask32(0) : __mmask32((uint64_t(1) << (K - k)) - 1);
      const __m512i w = _mm512_maskz_loadu_epi16(mask, row + k);
      for (int b = 0; b < B; ++b)
        acc[b][0] =
            added(acc[b][0], w, _mm512_maskz_loadu_epi16(mask, x + b * stride + k));
    }
    for (int b = 0; b < B; ++b)
      sums[b] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[b][0], acc[b][1]),
                                                   _mm512_add_ps(acc[b][2], acc[b][3])));
  }

  // Adds the products of 32 pairs to 16 sums: even and odd places share one.
  static __m512 added(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

#endif

// sums[i][b] = <row i of rows, x[b]> for `count` rows and any number of vectors: some vectors with all
// rows, then the next ones, so that both are read from the nearest cache.
template <typename T>
void dots(const T* rows, int64_t count, const typename Operand<T>::type* x, int64_t stride, int64_t K,
          int batch, float* sums) {
  int b = 0;
  for (; b + kBatch <= batch; b += kBatch)
    for (int64_t i = 0; i < count; ++i)
      Dot<T, kBatch>::run(rows + i * K, x + b * stride, stride, K, sums + i * batch + b);
  for (; b < batch; ++b)
    for (int64_t i = 0; i < count; ++i)
      Dot<T, 1>::run(rows + i * K, x + b * stride, stride, K, sums + i * batch + b);
}

// out[j] = <rows + j K, x> for four short rows that lie in a cache: keys of one head.
template <typename T, typename X>
void four(const T* rows, const X* x, int64_t K, float* out) {
#if !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<X, float>) {
    Lanes acc[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
    int64_t k = 0;
    for (; k + Lanes::kCount <= K; k += Lanes::kCount) {
      const Lanes vector = Lanes::load(x + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j] = acc[j].plus(Lanes::load(rows + j * K + k), vector);
    }
    const __m256 low = _mm256_hadd_ps(acc[0].v, acc[1].v);
    const __m256 sum = _mm256_hadd_ps(low, _mm256_hadd_ps(acc[2].v, acc[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
    for (; k < K; ++k)
      for (int j = 0; j < 4; ++j) out[j] += value(rows[j * K + k]) * x[k];
    return;
  }
#endif
  for (int j = 0; j < 4; ++j) Dot<T, 1>::run(rows + j * K, x, 0, K, out + j);
}

// sums[g][d] = sum over t of weights[g][t] values[t][d], for G heads that share their values.
template <typename T, int G>
void weighed(const float* const* weights, const T* values, int64_t count, int64_t D,
             float* const* sums) {
  constexpr int64_t L = Lanes::kCount;
  int64_t d = 0;
  for (; d + 2 * L <= D; d += 2 * L) {
    Lanes acc[G][2];
    for (int g = 0; g < G; ++g) acc[g][0] = acc[g][1] = Lanes::zero();
    for (int64_t t = 0; t < count; ++t) {
      const Lanes low = Lanes::load(values + t * D + d), high = Lanes::load(values + t * D + d + L);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Lanes weight = Lanes::of(weights[g][t]);
        acc[g][0] = acc[g][0].plus(weight, low);
        acc[g][1] = acc[g][1].plus(weight, high);
      }
    }
    for (int g = 0; g < G; ++g) {
      acc[g][0].store(sums[g] + d);
      acc[g][1].store(sums[g] + d + L);
    }
  }
  for (; d < D; ++d)
    for (int g = 0; g < G; ++g) {
      float sum = 0;
      for (int64_t t = 0; t < count; ++t) sum += weights[g][t] * value(values[t * D + d]);
      sums[g][d] = sum;
    }
}

}  // namespace
