// Products of one row of packed low-bit weights and some vectors, without expanding the row.
//
// The formats are those of effbench/nn/quant: `groupwise` (codes of 2 to 8 bits, a float16 scale and
// perhaps a zero point per group of a row), `shifted` (the same with a float16 shift) and `nf4` (4-bit codes of 16 levels, a doubly quantised
// scale per 64 weights). Vectors are held in blocks of 32 numbers as 16-bit integers (14-bit ones for
// NF4) with a scale each, so that products of codes and numbers are exact sums of integers: what is
// lost is half of a block's largest number / 32767 (8191), far less than bfloat16 loses.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

extern "C" {

// A linear layer; native.py has the same fields. Dense rows, or codes that follow each other without
// gaps, row after row.
struct Matrix {
  const void* weight;  // null: the layer is not there
  const void* bias;    // [rows], or null
  // groupwise: float16 [rows, groups]; nf4: uint8 [blocks of 64]; signs, trits: float16 [planes or
  // half of them, rows, groups]; nested: float16 [rows, 2^planes], the levels
  const void* scales;
  // groupwise: packed zero points, null if symmetric, or float16 shifts where `planes` is kShifts; nf4: float [blocks / 256]; signs: float [rows,
  // groups], null if nothing is added
  const void* zeros;
  const float* levels;  // nf4: the 256 levels of its scales
  const float* offset;  // nf4: added to each scale
  int64_t bits;         // 0: dense; 2 to 8: groupwise; kNF4, kSigns, kTrits, kNested
  int64_t group;        // weights that share a scale
  int64_t groups;       // scales of the whole matrix
  int64_t planes;       // bit planes; of groupwise codes kShifts where they have shifts
  int64_t stride;       // bytes from one plane to the next
};
}

namespace {

constexpr int64_t kNF4 = 104;
constexpr int64_t kSigns = 105, kTrits = 106, kNested = 107;  // see planes.h
inline bool in_planes(int64_t bits) { return bits >= kSigns; }
constexpr int64_t kShifts = 1;  // a group is scale * code + shift
// Codes that neither fill bytes nor halves of them: read a register of 16-bit windows at a time.
constexpr bool in_windows(int64_t bits) { return bits < 8 && bits != 4; }
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
// for groupwise codes; NF4's are looked up bytewise, the even ones in the high halves, and so are
// those of planes, in the order of columns; those of windows stand in that order anyway.
inline int64_t place(int64_t bits, int64_t i) {
  if (bits == 4) return i % 4 * 16 + i / 4;
  if (bits == 8) return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
  if (in_windows(bits)) return i;
  if (in_planes(bits)) return i / 32 * 32 + i / 8 % 2 * 16 + i / 16 % 2 * 8 + i % 8;
  const int64_t pair = i / 2, lane = pair / 16, in = pair % 16;  // of its parity
  return i % 2 * 32 + in / 8 * 16 + lane * 8 + in % 8;
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Sixteen 16-bit integers of each parity, of 32 in a row.
inline void by_parity(__m256i first, __m256i second, __m256i* even, __m256i* odd) {
  const __m256i a = _mm256_srai_epi32(_mm256_slli_epi32(first, 16), 16);
  const __m256i b = _mm256_srai_epi32(_mm256_slli_epi32(second, 16), 16);
  *even = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  *odd = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16)), 0xd8);
}

// The integers of 64 numbers, at their places.
inline void placed(int64_t bits, const int16_t* plain, int16_t* to) {
  const __m256i* from = reinterpret_cast<const __m256i*>(plain);
  __m256i n[4], even[2], odd[2], out[4];
  for (int i = 0; i < 4; ++i) n[i] = _mm256_load_si256(from + i);
  if (in_windows(bits)) {
    for (int i = 0; i < 4; ++i) out[i] = n[i];
  } else if (in_planes(bits)) {
    for (int i = 0; i < 4; ++i)
      out[i] = i % 2 ? _mm256_permute2x128_si256(n[i - 1], n[i], 0x31)
                     : _mm256_permute2x128_si256(n[i], n[i + 1], 0x20);
  } else {
    for (int i = 0; i < 2; ++i) by_parity(n[2 * i], n[2 * i + 1], even + i, odd + i);
    if (bits == 8) {
      for (int i = 0; i < 4; ++i) out[i] = i % 2 ? odd[i / 2] : even[i / 2];
    } else if (bits == 4) {
      by_parity(even[0], even[1], out, out + 2);
      by_parity(odd[0], odd[1], out + 1, out + 3);
    } else {
      for (int i = 0; i < 4; ++i) {
        const __m256i* one = i < 2 ? even : odd;
        out[i] = i % 2 ? _mm256_permute2x128_si256(one[0], one[1], 0x31)
                       : _mm256_permute2x128_si256(one[0], one[1], 0x20);
      }
    }
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, out[i]);
}

// Integers of a block of numbers, and their sum.
inline int32_t whole_numbers(const float* from, float by, int16_t* to) {
  const __m256 times = _mm256_set1_ps(by);
  __m256i n[4];
  for (int i = 0; i < 4; ++i)
    n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), times));
  for (int i = 0; i < 2; ++i)
    _mm256_store_si256(
        reinterpret_cast<__m256i*>(to) + i,
        _mm256_permute4x64_epi64(_mm256_packs_epi32(n[2 * i], n[2 * i + 1]), 0xd8));
  const __m256i sum =
      _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1);
}

#else

inline void placed(int64_t bits, const int16_t* plain, int16_t* to) {
  for (int64_t i = 0; i < 64; ++i) to[place(bits, i)] = plain[i];
}

inline int32_t whole_numbers(const float* from, float by, int16_t* to) {
  int32_t total = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t whole = int32_t(std::nearbyint(from[i] * by));
    to[i] = int16_t(whole);
    total += whole;
  }
  return total;
}

#endif

// Makes integers of a block of numbers; `scale` and `total` become those of it.
inline void whole_block(const float* from, float most, int16_t* to, float* scale, float* total) {
  float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t i = 0; i < kBlock; ++i) {
    const float size = from[i] < 0 ? -from[i] : from[i];
    largest = size > largest ? size : largest;
    poison += from[i] * 0.0f;  // what is not finite makes the whole block so
  }
  if (poison != 0 || poison != poison) {
    std::memset(to, 0, kBlock * sizeof(int16_t));
    *scale = *total = poison;
    return;
  }
  *scale = largest / most;
  *total = *scale * float(whole_numbers(from, largest > 0 ? most / largest : 0.0f, to));
}

// Makes integers of K float32 numbers, K a multiple of 32.
inline void packable(const float* x, int64_t K, int64_t bits, const Packable& out) {
  alignas(32) int16_t plain[64];
  const float most = largest_integer(bits);
  for (int64_t start = 0; start < K; start += 64) {
    for (int64_t block = 0; block < 64; block += kBlock) {
      const int64_t i = (start + block) / kBlock;
      if (start + block < K)
        whole_block(x + start + block, most, plain + block, out.scales + i, out.totals + i);
      else
        std::memset(plain + block, 0, kBlock * sizeof(int16_t));
    }
    placed(bits, plain, out.ints + start);
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

// Code i of a stream of codes of `bits` bits; reads no byte behind it.
inline int32_t code_at(const uint8_t* stream, int64_t i, int64_t bits) {
  const int64_t at = i * bits, shift = at & 7;
  uint32_t window = stream[at >> 3];
  if (shift + bits > 8) window |= uint32_t(stream[(at >> 3) + 1]) << 8;
  return int32_t(window >> shift & ((1u << bits) - 1));
}

// Groupwise: the scale of group i of all, and what is taken from its codes, as a multiple of it; with
// shifts that is the shift itself, to be added.
inline void group_scale(const Matrix& m, int64_t i, float* scale, float* zero) {
  *scale = half_value(static_cast<const uint16_t*>(m.scales)[i]);
  if (m.planes == kShifts) *zero = half_value(static_cast<const uint16_t*>(m.zeros)[i]);
  else if (!m.zeros) *zero = float((int64_t(1) << (m.bits - 1)) - 1);
  else *zero = float(code_at(static_cast<const uint8_t*>(m.zeros), i, m.bits));
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Scales and zero points, or shifts, of groups i to i + 7; those beyond the last group are what lies there, or 0.
__attribute__((always_inline)) inline void eight_scales(const Matrix& m, int64_t i, __m256* scale, __m256* zero) {
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
  if (m.planes == kShifts) {
    const uint16_t* own = static_cast<const uint16_t*>(m.zeros) + i;
    *zero = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
    return;
  }
  if (!zeros) {
    *zero = _mm256_set1_ps(float((int64_t(1) << (m.bits - 1)) - 1));
    return;
  }
  if (m.bits != 4 && m.bits != 8) {
    alignas(32) float eight[8];
    for (int64_t j = 0; j < 8; ++j) eight[j] = float(code_at(zeros, i + j, m.bits));
    *zero = _mm256_load_ps(eight);
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

// The scales and zero points of a row's groups, one after the other.
inline void row_scales(const Matrix& m, int64_t first, int64_t groups, float* scales, float* zeros) {
  for (int64_t i = 0; i < groups; i += 8) {
    __m256 scale, zero;
    eight_scales(m, first + i, &scale, &zero);
    _mm256_storeu_ps(scales + i, scale);
    _mm256_storeu_ps(zeros + i, zero);
  }
}

// Those of the groups in which blocks b to b + 7 are, of `per` blocks each.
struct Spread {
  int64_t per;
  int shift;    // per is two to its power, or it is negative
  __m256i lanes;

  explicit Spread(int64_t per_) : per(per_), shift(-1), lanes(_mm256_setzero_si256()) {
    if (per & (per - 1)) return;
    shift = __builtin_ctzll(uint64_t(per));
    lanes = _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm_cvtsi32_si128(shift));
  }
  __m256 of(const float* groups, int64_t b) const {
    if (shift >= 0)
      return _mm256_permutevar8x32_ps(_mm256_loadu_ps(groups + (b >> shift)), lanes);
    alignas(32) float eight[8];
    for (int64_t e = 0; e < 8; ++e) eight[e] = groups[(b + e) / per];
    return _mm256_load_ps(eight);
  }
};

// What each block of a row is multiplied by, for B vectors, and what is taken from their sums.
template <int B>
void factors(const Matrix& m, int64_t row, int64_t K, const Packable* x,
             float (*by)[kMostBlocks + 8], float* less) {
  const int64_t blocks = K / kBlock, per = m.group / kBlock;
  const int64_t groups = (K + m.group - 1) / m.group;
  float scales[kMostBlocks + 16], zeros[kMostBlocks + 16];
  const bool nf4 = m.bits == kNF4;
  if (nf4) {
    nf4_scales(m, row, K, scales);
    for (int64_t b = blocks; b % 8; ++b) scales[b] = 0.0f;
  } else if (per != 1) {
    row_scales(m, row * groups, groups, scales, zeros);
  }
  const Spread spread(per);
  __m256 shift[B];
  for (int b = 0; b < B; ++b) shift[b] = _mm256_setzero_ps();
  for (int64_t i = 0; i < blocks; i += 8) {
    __m256 scale, zero = _mm256_setzero_ps();
    if (nf4) {
      scale = _mm256_loadu_ps(scales + i);
    } else if (per == 1) {
      eight_scales(m, row * groups + i, &scale, &zero);
    } else {
      scale = spread.of(scales, i);
      zero = spread.of(zeros, i);
    }
    const __m256 both = m.planes == kShifts ? _mm256_sub_ps(_mm256_setzero_ps(), zero)
                                            : _mm256_mul_ps(scale, zero);
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
      less[b] += (m.planes == kShifts ? -zero : scale * zero) * x[b].totals[i];
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

// Where the codes of 16 in a row stand in the two bytes that each is read from, and how far up.
template <int64_t kBits>
struct Windows {
  __m256i bytes, up;
  Windows() {
    alignas(32) uint8_t from[32];
    alignas(32) uint16_t times[16];
    for (int i = 0; i < 16; ++i) {
      const int at = int(i * kBits);
      from[2 * i] = uint8_t(at >> 3);
      from[2 * i + 1] = uint8_t(std::min<int>((at >> 3) + 1, 2 * kBits - 1));
      times[i] = uint16_t(1u << (16 - kBits - (at & 7)));
    }
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    up = _mm256_load_si256(reinterpret_cast<const __m256i*>(times));
  }
  // 16 codes as 16-bit integers, in order, from 16 bytes that begin with them.
  __m256i codes(__m128i p) const {
    const __m256i two = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(p), bytes);
    return _mm256_srli_epi16(_mm256_mullo_epi16(two, up), 16 - kBits);
  }
};

// sums[b] += <codes, x[b]> for codes of any other bits, `room` bytes of which may be read.
template <int64_t kBits, int B>
void windows(const uint8_t* codes, int64_t room, int64_t K, const Packable* x,
             float (*by)[kMostBlocks + 8], float* sums) {
  const Windows<kBits> window;
  __m256 acc[B];
  for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_ps();
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t at = k * kBits / 8;
    __m128i bytes[2];
    if (at + 2 * kBits + 16 <= room) {
      for (int i = 0; i < 2; ++i)
        bytes[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at + i * 2 * kBits));
    } else {
      uint8_t near[2][16] = {};
      for (int i = 0; i < 2; ++i) {
        std::memcpy(near[i], codes + at + i * 2 * kBits, 2 * kBits);
        bytes[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(near[i]));
      }
    }
    const __m256i first = window.codes(bytes[0]), second = window.codes(bytes[1]);
    for (int b = 0; b < B; ++b) {
      const __m256i* v = reinterpret_cast<const __m256i*>(x[b].ints + k);
      const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(first, _mm256_loadu_si256(v)),
                                           _mm256_madd_epi16(second, _mm256_loadu_si256(v + 1)));
      acc[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_broadcast_ss(by[b] + k / kBlock),
                               acc[b]);
    }
  }
  for (int b = 0; b < B; ++b) sums[b] = folded(acc[b]);
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
void windows(const uint8_t* codes, int64_t, int64_t K, const Packable* x,
             float (*by)[kMostBlocks + 8], float* sums) {
  for (int b = 0; b < B; ++b) sums[b] = 0;
  for (int64_t block = 0; block < K / kBlock; ++block) {
    int32_t own[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) own[i] = code_at(codes, block * kBlock + i, kBits);
    for (int b = 0; b < B; ++b) {
      int64_t sum = 0;
      for (int64_t i = 0; i < kBlock; ++i) sum += own[i] * x[b].ints[block * kBlock + i];
      sums[b] += float(sum) * by[b][block];
    }
  }
}

template <int64_t kBits, int B>
void integers(const uint8_t* codes, int64_t K, const Packable* x, float (*by)[kMostBlocks + 8],
              float* sums) {
  uint8_t order[64];
  for (int64_t i = 0; i < 64; ++i) order[i] = uint8_t(place(kBits, i));
  for (int b = 0; b < B; ++b) {
    float total = 0;
    for (int64_t block = 0; block < K / kBlock; ++block) {
      int64_t sum = 0;
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
  constexpr int64_t kWide = kBits == kNF4 ? 4 : kBits;
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight) + row * K * kWide / 8;
  float by[B][kMostBlocks + 8], less[B];
  factors<B>(m, row, K, x, by, less);
  if constexpr (in_windows(kBits)) {
    const int64_t rows = m.groups / ((K + m.group - 1) / m.group);
    windows<kBits, B>(codes, (rows - row) * K * kBits / 8, K, x, by, sums);
  } else {
    integers<kBits, B>(codes, K, x, by, sums);
  }
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
  switch (m.bits) {
    case 2: return packed_dots<2>(m, row, K, x, batch, sums);
    case 3: return packed_dots<3>(m, row, K, x, batch, sums);
    case 4: return packed_dots<4>(m, row, K, x, batch, sums);
    case 5: return packed_dots<5>(m, row, K, x, batch, sums);
    case 6: return packed_dots<6>(m, row, K, x, batch, sums);
    case 7: return packed_dots<7>(m, row, K, x, batch, sums);
    case 8: return packed_dots<8>(m, row, K, x, batch, sums);
    default: return packed_dots<kNF4>(m, row, K, x, batch, sums);
  }
}

}  // namespace
