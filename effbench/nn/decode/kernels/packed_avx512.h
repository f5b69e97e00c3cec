// Products of rows of codes in windows with registers of 64 bytes (AVX-512 with BW, VL, VBMI and VNNI).
//
// A number of 16 bits is 256 times one signed byte and another, so codes stay bytes: four products of a
// code and a byte at a time are added up in 32 bits, for the upper bytes and for the lower ones. Codes of
// 4 and 8 bits gain nothing by it over packed_avx2.h.

#pragma once

#include "packed.h"

namespace {

// The integers of 64 numbers: their upper bytes and their lower ones.
inline void bytes_placed(const int16_t* plain, int16_t* to) {
  const __m512i half = _mm512_set1_epi16(128);
  __m256i* place = reinterpret_cast<__m256i*>(to);
  for (int i = 0; i < 2; ++i) {
    const __m512i whole = _mm512_load_si512(plain + 32 * i);
    const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(whole, half), 8);
    _mm256_storeu_si256(place + i, _mm512_cvtepi16_epi8(upper));
    _mm256_storeu_si256(place + 2 + i, _mm512_cvtepi16_epi8(whole));
  }
}

// Codes i to i + 15 of a stream of `all` codes of `bits` bits; zeros after its last byte.
inline __m512i sixteen_codes(const uint8_t* stream, int64_t i, int64_t all, int64_t bits) {
  const int64_t at = i * bits / 8, left = (all * bits + 7) / 8 - at;
  const __mmask16 there = __mmask16(left < 16 ? (1u << left) - 1 : 0xffff);
  const __m128i bytes = _mm_maskz_loadu_epi8(there, stream + at);
  unsigned __int128 whole;
  std::memcpy(&whole, &bytes, 16);
  whole >>= i * bits % 8;
  const __m128i eights = _mm_set_epi64x(int64_t(uint64_t(whole >> 8 * bits)), int64_t(uint64_t(whole)));
  const __m128i places = _mm_set1_epi64x(0x0706050403020100 * bits);  // of bits, a byte each
  const __m128i mask = _mm_set1_epi8(char((1 << bits) - 1));
  return _mm512_cvtepu8_epi32(_mm_and_si128(_mm_multishift_epi64_epi8(places, eights), mask));
}

// What the sums of blocks are multiplied by, and what is taken from them as a multiple of the vectors'
// sums, for some rows that follow each other.
template <int64_t kBits>
class WideFactors {
 public:
  WideFactors(const Matrix& m, int64_t K)
      : m_(m), groups_((K + m.group - 1) / m.group), per_(m.group / kBlock), lanes_(of_blocks(0)) {
    while (!(per_ >> shift_ & 1)) ++shift_;
    even_ = per_ == int64_t(1) << shift_;
  }

  // As many rows as there is room for.
  int64_t most() const { return std::max<int64_t>(1, kRoom / groups_); }

  void take(int64_t row, int64_t count) {
    const int64_t first = row * groups_;
    for (int64_t i = 0; i < count * groups_; i += 16) {
      const int64_t left = m_.groups - first - i;
      const __mmask16 known = __mmask16(left < 16 ? (1u << left) - 1 : 0xffff);
      const __m512 own = halves(m_.scales, first + i, known);
      __m512 other;
      if (m_.planes == kShifts)
        other = _mm512_sub_ps(_mm512_setzero_ps(), halves(m_.zeros, first + i, known));
      else if (m_.zeros)
        other = _mm512_mul_ps(own, _mm512_cvtepi32_ps(sixteen_codes(static_cast<const uint8_t*>(m_.zeros),
                                                                    first + i, m_.groups, kBits)));
      else
        other = _mm512_mul_ps(own, _mm512_set1_ps(float((int64_t(1) << (kBits - 1)) - 1)));
      _mm512_store_ps(scales_ + i, own);
      _mm512_store_ps(less_ + i, other);
    }
  }

  // Those of blocks i to i + 15 of row r of them, i a multiple of 16; zeros where `there` says so.
  __attribute__((always_inline)) void of(int64_t r, int64_t i, __mmask16 there, __m512* scale,
                                         __m512* less) const {
    const int64_t at = r * groups_ + (even_ ? i >> shift_ : i / per_);
    const __m512i lanes = even_ ? lanes_ : of_blocks(i);
    *scale = _mm512_maskz_permutexvar_ps(there, lanes, _mm512_loadu_ps(scales_ + at));
    *less = _mm512_maskz_permutexvar_ps(there, lanes, _mm512_loadu_ps(less_ + at));
  }

 private:
  static constexpr int64_t kRoom = 2 * kMostBlocks;

  static __m512 halves(const void* all, int64_t i, __mmask16 known) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(known, static_cast<const uint16_t*>(all) + i));
  }

  // Which group, counted from that of block i, each block from there on belongs to.
  __attribute__((noinline)) __m512i of_blocks(int64_t i) const {
    alignas(64) int32_t lanes[16];
    for (int64_t l = 0; l < 16; ++l) lanes[l] = int32_t((i + l) / per_ - i / per_);
    return _mm512_load_si512(lanes);
  }

  const Matrix& m_;
  const int64_t groups_, per_;  // of a row; per_: blocks of a group
  int shift_ = 0;               // per_ is two to its power, where it is `even_`
  bool even_;
  const __m512i lanes_;
  alignas(64) float scales_[kRoom + 32], less_[kRoom + 32];
};

// The sums of products of 64 codes, four neighbours each.
template <int64_t kBits>
class WideCodes {
 public:
  WideCodes() {
    alignas(64) uint8_t from[64];
    uint8_t places[8];
    for (int i = 0; i < 64; ++i) from[i] = uint8_t(i / 8 * kBits + i % 8);
    for (int i = 0; i < 8; ++i) places[i] = uint8_t(i * kBits);
    int64_t eight;
    std::memcpy(&eight, places, 8);
    bytes_ = _mm512_load_si512(from);
    places_ = _mm512_set1_epi64(eight);
  }

  // out[b] = those of x[b] from column k on and `count` codes from p on.
  template <int B>
  __attribute__((always_inline)) void sums(const uint8_t* p, int64_t count, const Packable* x, int64_t k,
                                           __m512i* out) const {
    const __mmask64 there = (uint64_t(1) << count * kBits / 8) - 1;
    const __m512i eights = _mm512_permutexvar_epi8(bytes_, _mm512_maskz_loadu_epi8(there, p));
    const __m512i c = _mm512_and_si512(_mm512_multishift_epi64_epi8(places_, eights),
                                       _mm512_set1_epi8((1 << kBits) - 1));
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const int16_t* v = x[b].ints + k;
      const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, _mm512_loadu_si512(v));
      out[b] = _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), c, _mm512_loadu_si512(v + 32));
    }
  }

 private:
  __m512i bytes_, places_;  // of each eight codes: their bytes, and where their bits begin in them
};

// sums[i][b] = <row + i, x[b]> for `count` rows, `stride` numbers between two of them.
template <int64_t kBits, int B>
__attribute__((noinline)) void wide_rows(const Matrix& m, int64_t row, int64_t count, int64_t K,
                                         const Packable* x, float* sums, int64_t stride) {
  constexpr int64_t kSpan = 64, kStep = 16 * kBlock;  // columns of a register of codes, and of one of scales
  const __m512i lanes = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 3);  // their blocks
  WideFactors<kBits> factors(m, K);
  const WideCodes<kBits> codes;
  const uint8_t* own = static_cast<const uint8_t*>(m.weight) + row * K * kBits / 8;
  const int64_t most = factors.most();
  for (int64_t i = 0; i < count; ++i, sums += stride, own += K * kBits / 8) {
    if (i % most == 0) factors.take(row + i, std::min(count - i, most));
    __m512 acc[B], more[B], by[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[b] = more[b] = _mm512_setzero_ps();
    const auto factored = [&](int64_t k, __mmask16 there) __attribute__((always_inline)) {
      __m512 scale, less;
      factors.of(i % most, k / kBlock, there, &scale, &less);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        by[b] = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(there, x[b].scales + k / kBlock));
        more[b] = _mm512_fnmadd_ps(less, _mm512_maskz_loadu_ps(there, x[b].totals + k / kBlock), more[b]);
      }
    };
    const auto add = [&](int64_t k, int64_t j, int64_t left) __attribute__((always_inline)) {
      __m512i sum[B];
      codes.template sums<B>(own + k * kBits / 8, left, x, k, sum);
      const __m512i turn = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(j * (kSpan / kBlock))));
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        acc[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[b]), _mm512_permutexvar_ps(turn, by[b]), acc[b]);
    };
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      factored(k, 0xffff);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kStep / kSpan; ++j) add(k + j * kSpan, j, kSpan);
    }
    if (k < K) {
      factored(k, __mmask16((1u << (K - k) / kBlock) - 1));
      int64_t j = 0;
      for (; k + kSpan <= K; k += kSpan, ++j) add(k, j, kSpan);
      if (k < K) add(k, j, K - k);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b] = _mm512_reduce_add_ps(_mm512_add_ps(acc[b], more[b]));
  }
}

}  // namespace
