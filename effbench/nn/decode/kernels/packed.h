// Products of one row of packed low-bit weights and some vectors, without expanding the row. How they are
// made is said for three kinds of machines, in packed_avx512.h, packed_avx2.h and packed_plain.h.
//
// The formats are those of effbench/nn/quant: `groupwise` (codes of 2 to 8 bits, a float16 scale and
// perhaps a zero point per group of a row), `shifted` (the same with a float16 shift) and `nf4` (4-bit codes of 16 levels, a doubly quantised
// scale per 64 weights). Vectors are held in blocks of 32 numbers as 16-bit integers (14-bit ones for
// NF4) with a scale each, so that products of codes and numbers are exact sums of integers: what is
// lost is half of a block's largest number / 32639 (8191), far less than bfloat16 loses.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
constexpr bool in_windows(int64_t bits) { return bits < 8 && bits != 4; }  // neither bytes nor halves
constexpr int64_t kBlock = 32;    // numbers that share a scale
// Largest integer of a number: 8 products with a code, or with a 16-bit level of NF4, fit 32 bits, and
// both of the bytes that a number of codes is taken apart into have signs.
inline float largest_integer(int64_t bits) {
  return bits == kNF4 ? 8191 : in_planes(bits) ? 32767 : 127 * 256 + 127;
}
constexpr int64_t kWidest = 32768;  // columns
constexpr int64_t kMostBlocks = kWidest / kBlock;

// The levels of NF4 (see nf4.py), times 32767.
constexpr int16_t kLevels[16] = {-32767, -22812, -17205, -12940, -9320, -6054, -2983, 0,
                                 2608,   5273,   8064,   11072,  14441, 18435, 23689, 32767};

// One vector as packed products take it; `ints` is laid out as the codes' registers are.
struct Packable {
  int16_t* ints;  // [padded(columns)], zeros after the last
  float* scales;  // [columns / 32] at their `block_place`, and zeros up to a multiple of 8
  float* totals;  // likewise: sums of the blocks' numbers
};

// Codes of half a byte: a register holds two blocks of them.
constexpr bool in_nibbles(int64_t bits) { return bits == 4 || bits == kNF4; }

// Room for `ints`: the last register may be in part empty.
inline int64_t padded(int64_t K) { return (K + 127) / 128 * 128; }

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

// The numbers that a row of groupwise codes stands for.
template <typename T>
inline void expanded(const Matrix& m, int64_t row, int64_t K, T* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight);
  const int64_t groups = (K + m.group - 1) / m.group;
  float scale = 0, zero = 0;
  for (int64_t i = 0; i < K; ++i) {
    if (i % m.group == 0) group_scale(m, row * groups + i / m.group, &scale, &zero);
    out[i] = rounded<T>((float(code_at(codes, row * K + i, m.bits)) - zero) * scale);
  }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

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

inline float folded(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#else

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

}  // namespace

// Each of them has `block_place`, where block i stands among the sums of a vector's blocks; `placed`, the
// integers of 64 numbers at their places; and `rows`, products.
#if defined(WIDE)
#include "packed_avx512.h"
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "packed_avx2.h"
#else
#include "packed_plain.h"
#endif

namespace {

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
  alignas(64) int16_t plain[64];
  const float most = largest_integer(bits);
  for (int64_t start = 0; start < padded(K); start += 64) {
    for (int64_t block = 0; block < 64; block += kBlock) {
      const int64_t i = block_place(bits, (start + block) / kBlock);
      if (start + block < K)
        whole_block(x + start + block, most, plain + block, out.scales + i, out.totals + i);
      else
        std::memset(plain + block, 0, kBlock * sizeof(int16_t));
    }
    placed(bits, plain, start, out.ints);
  }
}

template <int64_t kBits>
void packed_rows(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x, int batch,
                 float* sums) {
  int b = 0;
  for (; b + 4 <= batch; b += 4) rows<kBits, 4>(m, row, count, K, x + b, sums + b, batch);
  for (; b < batch; ++b) rows<kBits, 1>(m, row, count, K, x + b, sums + b, batch);
}

// sums[i][b] = <row + i, x[b]> for `count` rows and any number of vectors.
__attribute__((noinline)) inline void packed_dots(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x,
                        int batch, float* sums) {
  switch (m.bits) {
    case 2: return packed_rows<2>(m, row, count, K, x, batch, sums);
    case 3: return packed_rows<3>(m, row, count, K, x, batch, sums);
    case 4: return packed_rows<4>(m, row, count, K, x, batch, sums);
    case 5: return packed_rows<5>(m, row, count, K, x, batch, sums);
    case 6: return packed_rows<6>(m, row, count, K, x, batch, sums);
    case 7: return packed_rows<7>(m, row, count, K, x, batch, sums);
    case 8: return packed_rows<8>(m, row, count, K, x, batch, sums);
    default: return packed_rows<kNF4>(m, row, count, K, x, batch, sums);
  }
}

}  // namespace
