// Products of one row of packed low-bit weights and some vectors, without expanding the row.
//
// The formats are those of effbench/nn/quant: `groupwise` (codes of 4 or 8 bits, a float16 scale and
// perhaps a zero point per group of a row) and `nf4` (4-bit codes of 16 levels, a doubly quantised
// scale per 64 weights). Vectors are held in blocks of 32 numbers as 16-bit integers (14-bit ones for
// NF4) with a scale each, so that products of codes and numbers are exact sums of integers: what is
// lost is half of a block's largest number / 32767 (8191), far less than bfloat16 loses.

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

extern "C" {

// A linear layer; native.py has the same fields. Dense rows, or codes that follow each other without
// gaps, row after row.
struct Matrix {
  const void* weight;  // null: the layer is not there
  const void* bias;    // [rows], or null
  const void* scales;  // groupwise: float16 [rows, groups]; nf4: uint8 [blocks of 64]
  const void* zeros;   // groupwise: packed zero points, null if symmetric; nf4: float [blocks / 256]
  const float* levels;  // nf4: the 256 levels of its scales
  const float* offset;  // nf4: added to each scale
  int64_t bits;         // 0: dense; 4 or 8: groupwise; kNF4
  int64_t group;        // groupwise: weights that share a scale
  int64_t groups;       // groupwise: scales of the whole matrix
};
}

namespace {

constexpr int64_t kNF4 = 104;
constexpr int64_t kBlock = 32;    // numbers that share a scale
// Largest integer of a number: 8 products with a code, or with a 16-bit level, fit 32 bits.
inline float largest_integer(int64_t bits) { return bits == kNF4 ? 8191 : 32767; }
constexpr int64_t kWidest = 32768;  // columns
constexpr int64_t kMostBlocks = kWidest / kBlock;

// The levels of NF4 (see nf4.py), times 32767.
constexpr int16_t kLevels[16] = {-32767, -22812, -17205, -12940, -9320, -6054, -2983, 0,
                                 2608,   5273,   8064,   11072,  14441, 18435, 23689, 32767};

// One vector as packed products take it; `ints` is laid out as the codes' registers are.
struct Packable {
  int16_t* ints;  // [columns]
  float* scales;  // [columns / 32], and zeros up to a multiple of 8
  float* totals;  // likewise: sums of the blocks' numbers
};

// Where number i of 64 stands in the registers: with nibbles, number 4 j + q is lane j of register q
// for groupwise codes; NF4's are looked up bytewise, the even ones in the high halves.
inline int64_t place(int64_t bits, int64_t i) {
  if (bits == 4) return i % 4 * 16 + i / 4;
  if (bits == 8) return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
  const int64_t pair = i / 2, lane = pair / 16, in = pair % 16;  // of its parity
  return i % 2 * 32 + in / 8 * 16 + lane * 8 + in % 8;
}

// Makes integers of K float32 numbers, K a multiple of 32.
inline void packable(const float* x, int64_t K, int64_t bits, const Packable& out) {
  int16_t plain[64];
  uint8_t order[64];
  const float most = largest_integer(bits);
  for (int64_t i = 0; i < 64; ++i) order[i] = uint8_t(place(bits, i));
  for (int64_t start = 0; start < K; start += 64) {
    const int64_t here = K - start < 64 ? K - start : 64;
    for (int64_t block = 0; block < 64; block += kBlock) {
      if (block >= here) {
        std::memset(plain + block, 0, kBlock * sizeof(int16_t));
        continue;
      }
      const float* from = x + start + block;
      float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
      for (int64_t i = 0; i < kBlock; ++i) {
        const float size = from[i] < 0 ? -from[i] : from[i];
        largest = size > largest ? size : largest;
        poison += from[i] * 0.0f;  // what is not finite makes the whole block so
      }
      const float scale = largest / most;
      const float by = largest > 0 ? most / largest : 0.0f;
      if (poison != 0 || poison != poison) {
        std::memset(plain + block, 0, kBlock * sizeof(int16_t));
        out.scales[(start + block) / kBlock] = out.totals[(start + block) / kBlock] = poison;
        continue;
      }
      int32_t total = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        const int32_t whole = int32_t(std::nearbyint(from[i] * by));
        plain[block + i] = int16_t(whole);
        total += whole;
      }
      out.scales[(start + block) / kBlock] = scale;
      out.totals[(start + block) / kBlock] = scale * float(total);
    }
    for (int64_t i = 0; i < 64; ++i) out.ints[start + order[i]] = plain[i];
  }
}

// Room for `ints`: the last register may be half empty.
inline int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }

inline float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  float out;
  if (rest >= 0x0400u) {
    bits = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
    std::memcpy(&out, &bits, 4);
  } else {
    out = float(rest) * 5.9604644775390625e-8f;  // 2^-24
  }
  std::memcpy(&bits, &out, 4);
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

#if defined(__AVX2__)
inline float folded(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

// NF4: the scales of a row's blocks.
inline void nf4_scales(const Matrix& m, int64_t row, int64_t K, float* scales) {
  const uint8_t* codes = static_cast<const uint8_t*>(m.scales);
  const float* second = static_cast<const float*>(m.zeros);
  for (int64_t b = 0; b < K / kBlock; ++b) {
    const int64_t at = (row * K + b * kBlock) / 64;
    scales[b] = (m.levels[codes[at]] * second[at / 256] + *m.offset) * (1.0f / 32767);
  }
}

// Groupwise: the scale and the zero point of group i of all.
inline void group_scale(const Matrix& m, int64_t i, float* scale, float* zero) {
  const uint8_t* zeros = static_cast<const uint8_t*>(m.zeros);
  *scale = half_value(static_cast<const uint16_t*>(m.scales)[i]);
  if (!zeros) *zero = m.bits == 4 ? 7.0f : 127.0f;
  else if (m.bits == 8) *zero = float(zeros[i]);
  else *zero = float(zeros[i >> 1] >> ((i & 1) * 4) & 15);
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Scales and zero points of groups i to i + 7; those beyond the last group are what lies there, or 0.
inline void eight_scales(const Matrix& m, int64_t i, __m256* scale, __m256* zero) {
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + i;
  const uint8_t* zeros = static_cast<const uint8_t*>(m.zeros);
  if (i + 16 > m.groups) {  // near the end of what may be read
    alignas(32) float near[2][8] = {};
    for (int64_t j = 0; j < 8 && i + j < m.groups; ++j)
      group_scale(m, i + j, near[0] + j, near[1] + j);
    *scale = _mm256_load_ps(near[0]);
    *zero = _mm256_load_ps(near[1]);
    return;
  }
  *scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  if (!zeros) {
    *zero = _mm256_set1_ps(m.bits == 4 ? 7.0f : 127.0f);
    return;
  }
  uint64_t bytes;
  std::memcpy(&bytes, zeros + (m.bits == 8 ? i : i >> 1), 8);
  if (m.bits == 8) {
    *zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
    return;
  }
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i all = _mm256_set1_epi32(int32_t(uint32_t(bytes >> ((i & 1) * 4))));
  *zero = _mm256_cvtepi32_ps(
      _mm256_and_si256(_mm256_srlv_epi32(all, shifts), _mm256_set1_epi32(15)));
}

// What each block of a row is multiplied by, for B vectors, and what is taken from their sums.
template <int B>
void factors(const Matrix& m, int64_t row, int64_t K, const Packable* x,
             float (*by)[kMostBlocks + 8], float* less) {
  const int64_t blocks = K / kBlock, per = m.group / kBlock;
  const int64_t first = row * ((K + m.group - 1) / m.group);
  float scales[kMostBlocks + 8], zeros[kMostBlocks + 8];
  const bool nf4 = m.bits == kNF4;
  if (nf4) {
    nf4_scales(m, row, K, scales);
    for (int64_t b = blocks; b % 8; ++b) scales[b] = 0.0f;
  } else if (per != 1) {
    for (int64_t b = 0, i = first; b < blocks; ++i) {
      float scale, zero;
      group_scale(m, i, &scale, &zero);
      for (const int64_t end = b + per; b < end && b < blocks; ++b)
        scales[b] = scale, zeros[b] = zero;
    }
    for (int64_t b = blocks; b % 8; ++b) scales[b] = zeros[b] = 0.0f;
  }
  __m256 shift[B];
  for (int b = 0; b < B; ++b) shift[b] = _mm256_setzero_ps();
  for (int64_t i = 0; i < blocks; i += 8) {
    __m256 scale, zero = _mm256_setzero_ps();
    if (!nf4 && per == 1) eight_scales(m, first + i, &scale, &zero);
    else scale = _mm256_loadu_ps(scales + i), zero = nf4 ? zero : _mm256_loadu_ps(zeros + i);
    const __m256 both = _mm256_mul_ps(scale, zero);
    for (int b = 0; b < B; ++b) {
      _mm256_storeu_ps(by[b] + i, _mm256_mul_ps(scale, _mm256_loadu_ps(x[b].scales + i)));
      shift[b] = _mm256_fmadd_ps(both, _mm256_loadu_ps(x[b].totals + i), shift[b]);
    }
  }
  for (int b = 0; b < B; ++b) less[b] = folded(shift[b]);
}

#else

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
      less[b] += scale * zero * x[b].totals[i];
    }
  }
}

#endif

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// The 64 numbers at p, or 32 and nothing, as bytes of nibbles.
inline __m256i nibbles_at(const uint8_t* p, bool whole) {
  if (whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// sums[b] += <codes, x[b]>: integers of 64 numbers, as 8 partial sums in float32 by their scales.
template <int64_t kBits, int B>
void integers(const uint8_t* codes, int64_t K, const Packable* x, float (*by)[kMostBlocks + 8],
              float* sums) {
  const __m256i low = _mm256_set1_epi16(15);
  const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  __m256 acc[B];
  for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_ps();
  if constexpr (kBits == 8) {
    const __m256i even = _mm256_set1_epi16(255);
    for (int64_t k = 0; k < K; k += 32) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k));
      const __m256i first = _mm256_and_si256(c, even), second = _mm256_srli_epi16(c, 8);
      for (int b = 0; b < B; ++b) {
        const __m256i* v = reinterpret_cast<const __m256i*>(x[b].ints + k);
        const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(first, _mm256_loadu_si256(v)),
                                             _mm256_madd_epi16(second, _mm256_loadu_si256(v + 1)));
        acc[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                                 _mm256_broadcast_ss(by[b] + k / kBlock), acc[b]);
      }
    }
  } else {
    __m256i lower = low, upper = low;
    if constexpr (kBits == kNF4) {
      alignas(16) uint8_t bytes[2][16];
      for (int i = 0; i < 16; ++i) {
        bytes[0][i] = uint8_t(uint16_t(kLevels[i]) & 255);
        bytes[1][i] = uint8_t(uint16_t(kLevels[i]) >> 8);
      }
      lower = _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(bytes[0]));
      upper = _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(bytes[1]));
    }
    for (int64_t k = 0; k < K; k += 64) {
      const __m256i c = nibbles_at(codes + k / 2, k + 64 <= K);
      __m256i part[4];
      if constexpr (kBits == kNF4) {
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i odd = _mm256_and_si256(c, mask);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(c, 4), mask);
        const __m256i even_low = _mm256_shuffle_epi8(lower, even);
        const __m256i even_high = _mm256_shuffle_epi8(upper, even);
        const __m256i odd_low = _mm256_shuffle_epi8(lower, odd);
        const __m256i odd_high = _mm256_shuffle_epi8(upper, odd);
        part[0] = _mm256_unpacklo_epi8(even_low, even_high);
        part[1] = _mm256_unpackhi_epi8(even_low, even_high);
        part[2] = _mm256_unpacklo_epi8(odd_low, odd_high);
        part[3] = _mm256_unpackhi_epi8(odd_low, odd_high);
      } else {
        part[0] = _mm256_and_si256(c, low);
        part[1] = _mm256_and_si256(_mm256_srli_epi16(c, 4), low);
        part[2] = _mm256_and_si256(_mm256_srli_epi16(c, 8), low);
        part[3] = _mm256_srli_epi16(c, 12);
      }
      for (int b = 0; b < B; ++b) {
        const __m256i* v = reinterpret_cast<const __m256i*>(x[b].ints + k);
        __m256i sum = _mm256_madd_epi16(part[0], _mm256_loadu_si256(v));
        for (int q = 1; q < 4; ++q)
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part[q], _mm256_loadu_si256(v + q)));
        const __m256i pair = _mm256_castpd_si256(
            _mm256_broadcast_sd(reinterpret_cast<const double*>(by[b] + k / kBlock)));
        const __m256 scale = _mm256_permutevar_ps(_mm256_castsi256_ps(pair), spread);
        acc[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[b]);
      }
    }
  }
  for (int b = 0; b < B; ++b) sums[b] = folded(acc[b]);
}

#else

template <int64_t kBits, int B>
void integers(const uint8_t* codes, int64_t K, const Packable* x, float (*by)[kMostBlocks + 8],
              float* sums) {
  uint8_t order[64];
  for (int64_t i = 0; i < 64; ++i) order[i] = uint8_t(place(kBits, i));
  for (int b = 0; b < B; ++b) {
    float total = 0;
    for (int64_t block = 0; block < K / kBlock; ++block) {
      int32_t sum = 0;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
        const uint8_t byte = kBits == 8 ? codes[i] : codes[i / 2];
        const bool high = (i % 2 == 1) != (kBits == kNF4);
        const int32_t code = kBits == 8 ? byte : (high ? byte >> 4 : byte & 15);
        const int32_t level = kBits == kNF4 ? kLevels[code] : code;
        sum += level * x[b].ints[i / 64 * 64 + order[i % 64]];
      }
      total += float(sum) * by[b][block];
    }
    sums[b] = total;
  }
}

#endif

template <int64_t kBits, int B>
void packed_dot(const Matrix& m, int64_t row, int64_t K, const Packable* x, float* sums) {
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight) + row * K * (kBits == 8 ? 8 : 4) / 8;
  float by[B][kMostBlocks + 8], less[B];
  factors<B>(m, row, K, x, by, less);
  integers<kBits, B>(codes, K, x, by, sums);
  for (int b = 0; b < B; ++b) sums[b] -= less[b];
}

template <int64_t kBits>
void packed_dots(const Matrix& m, int64_t row, int64_t K, const Packable* x, int batch,
                 float* sums) {
  int b = 0;
  for (; b + 4 <= batch; b += 4) packed_dot<kBits, 4>(m, row, K, x + b, sums + b);
  for (; b < batch; ++b) packed_dot<kBits, 1>(m, row, K, x + b, sums + b);
}

// sums[b] = <row, x[b]> for any number of vectors.
inline void packed_dots(const Matrix& m, int64_t row, int64_t K, const Packable* x, int batch,
                        float* sums) {
  if (m.bits == 4) return packed_dots<4>(m, row, K, x, batch, sums);
  if (m.bits == 8) return packed_dots<8>(m, row, K, x, batch, sums);
  packed_dots<kNF4>(m, row, K, x, batch, sums);
}

}  // namespace
