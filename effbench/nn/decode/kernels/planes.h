// Products of one row of bit planes and some vectors, without expanding the row.
//
// How bits lie is said in effbench/nn/quant/planes.py. A code of up to 8 bits is put together from
// its planes, one byte a column, and what it stands for is looked up in tables of 16-bit integers:
//   signs, trits  w = base + sum over planes i of c_i bit_i, with a c_i for each group of a row:
//                 two tables of 16 sums, one for each half of the code
//   nested        w = level of the code, 2^b of them for each row
// Vectors are those of packed.h. Of a weight half of the largest sum / 32766 is lost.

#pragma once

#include "packed.h"

namespace {

constexpr int64_t kSpan = 256;        // columns whose bits stand together in a plane
constexpr float kLargestLevel = 32766;  // two levels, rounded, add up to a 16-bit integer
constexpr int64_t kMostLevels = 256;

// Byte of plane i of a row.
inline const uint8_t* plane_at(const Matrix& m, int64_t i, int64_t row, int64_t K) {
  return static_cast<const uint8_t*>(m.weight) + i * m.stride + row * (K / 8);
}

// -- codes ---------------------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Bit k of byte j of four planes, the most significant first, as code of byte j of out[k].
inline void four_planes(const __m256i* p, __m256i* out) {
  const __m256i twos = _mm256_set1_epi8(0x55), fours = _mm256_set1_epi8(0x33);
  const __m256i low = _mm256_set1_epi8(15);
  __m256i pairs[2][2];  // of even and of odd k
  for (int i = 0; i < 2; ++i) {
    const __m256i a = p[2 * i], b = p[2 * i + 1];
    pairs[0][i] = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(a, twos), 1),
                                  _mm256_and_si256(b, twos));
    pairs[1][i] = _mm256_or_si256(_mm256_andnot_si256(twos, a),
                                  _mm256_and_si256(_mm256_srli_epi16(b, 1), twos));
  }
  for (int odd = 0; odd < 2; ++odd) {
    const __m256i a = pairs[odd][0], b = pairs[odd][1];
    const __m256i near = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(a, fours), 2),
                                         _mm256_and_si256(b, fours));
    const __m256i far = _mm256_or_si256(_mm256_andnot_si256(fours, a),
                                        _mm256_and_si256(_mm256_srli_epi16(b, 2), fours));
    out[odd] = _mm256_and_si256(near, low);
    out[odd + 2] = _mm256_and_si256(far, low);
    out[odd + 4] = _mm256_and_si256(_mm256_srli_epi16(near, 4), low);
    out[odd + 6] = _mm256_and_si256(_mm256_srli_epi16(far, 4), low);
  }
}

// Where columns 32 m + 4 e to 32 m + 4 e + 3 of a last span of 8 s columns lie: word and shift.
struct Tail {
  int32_t word[7][8], shift[7][8];
  explicit Tail(int32_t s) {
    for (int32_t m = 0; m < 7; ++m)
      for (int32_t e = 0; e < 8; ++e) {
        word[m][e] = (32 * m + 4 * e) % s / 4;
        shift[m][e] = (32 * m + 4 * e) / s;
      }
  }
};

inline void tail_codes(const Matrix& m, int64_t row, int64_t K, int64_t start, uint8_t* codes) {
  static const Tail kTails[7] = {Tail(4),  Tail(8),  Tail(12), Tail(16),
                                 Tail(20), Tail(24), Tail(28)};
  const int64_t columns = K - start, words = columns / 32;
  const Tail& tail = kTails[words - 1];
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(words)), lanes);
  const __m256i one = _mm256_set1_epi8(1);
  __m256i planes[8];
  for (int64_t i = 0; i < m.planes; ++i)
    planes[i] = _mm256_maskload_epi32(
        reinterpret_cast<const int*>(plane_at(m, i, row, K) + start / 8), mask);
  for (int64_t block = 0; block < words; ++block) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail.word[block]));
    const __m256i shift = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail.shift[block]));
    __m256i code = _mm256_setzero_si256();
    for (int64_t i = 0; i < m.planes; ++i) {
      const __m256i bits = _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(planes[i], word), shift);
      code = _mm256_or_si256(_mm256_add_epi8(code, code), _mm256_and_si256(bits, one));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + start + 32 * block), code);
  }
}

// The codes of a row, a byte each; K is a multiple of 32.
inline void row_codes(const Matrix& m, int64_t row, int64_t K, uint8_t* codes) {
  const int64_t first = 8 - m.planes;  // of eight planes, the ones in front are zeros
  int64_t start = 0;
  for (; start + kSpan <= K; start += kSpan) {
    __m256i planes[8], codes_low[8], codes_high[8];
    for (int64_t i = 0; i < 8; ++i)
      planes[i] = i < first ? _mm256_setzero_si256()
                            : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                  plane_at(m, i - first, row, K) + start / 8));
    four_planes(planes + 4, codes_low);
    if (first < 4) {
      four_planes(planes, codes_high);
      for (int k = 0; k < 8; ++k)
        codes_low[k] = _mm256_or_si256(codes_low[k], _mm256_slli_epi16(codes_high[k], 4));
    }
    for (int k = 0; k < 8; ++k)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + start + 32 * k), codes_low[k]);
  }
  if (start < K) tail_codes(m, row, K, start, codes);
}

#else

inline void row_codes(const Matrix& m, int64_t row, int64_t K, uint8_t* codes) {
  for (int64_t start = 0; start < K; start += kSpan) {
    const int64_t strand = std::min(K - start, kSpan) / 8;
    for (int64_t i = 0; i < 8 * strand; ++i) {
      uint8_t code = 0;
      for (int64_t p = 0; p < m.planes; ++p)
        code = uint8_t(code << 1 |
                       (plane_at(m, p, row, K)[start / 8 + i % strand] >> i / strand & 1));
      codes[start + i] = code;
    }
  }
}

#endif

// -- what codes stand for -------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Sixteen levels as 16-bit integers: their lower and their upper bytes.
struct Table {
  __m256i low, high;
  Table() = default;
  Table(__m256 first, __m256 second) {
    const __m256i whole = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second)), 0xd8);
    const __m128i a = _mm256_castsi256_si128(whole), b = _mm256_extracti128_si256(whole, 1);
    const __m128i mask = _mm_set1_epi16(255);
    low = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask)));
    high = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
  Table(const float* levels, float by)
      : Table(_mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(by)),
              _mm256_mul_ps(_mm256_loadu_ps(levels + 8), _mm256_set1_ps(by))) {}
};

// The sums of all subsets of four weights, 8 apart, and `start`.
inline Table subset_sums(const float* weights, float start) {
  const auto at = [&](int bit) { return _mm256_set1_ps(weights[8 * bit]); };
  __m256 sums = _mm256_set1_ps(start);
  sums = _mm256_fmadd_ps(at(0), _mm256_setr_ps(0, 1, 0, 1, 0, 1, 0, 1), sums);
  sums = _mm256_fmadd_ps(at(1), _mm256_setr_ps(0, 0, 1, 1, 0, 0, 1, 1), sums);
  sums = _mm256_fmadd_ps(at(2), _mm256_setr_ps(0, 0, 0, 0, 1, 1, 1, 1), sums);
  return {sums, _mm256_add_ps(sums, at(3))};
}

// What 32 codes stand for: columns 0 to 7 and 16 to 23, then the others.
struct Looked {
  __m256i first, second;
  Looked(__m256i low, __m256i high)
      : first(_mm256_unpacklo_epi8(low, high)), second(_mm256_unpackhi_epi8(low, high)) {}
};

inline __m256i codes_at(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

inline Looked looked_up(const Table& table, __m256i codes) {
  return {_mm256_shuffle_epi8(table.low, codes), _mm256_shuffle_epi8(table.high, codes)};
}

// Of one table, or of several: one counts where the upper half of a code is its number.
inline Looked looked_up(const Table* tables, int64_t count, const uint8_t* codes) {
  const __m256i c = codes_at(codes);
  if (count == 1) return looked_up(tables[0], c);
  __m256i low = _mm256_setzero_si256(), high = low;
  const __m256i others = _mm256_set1_epi8(0x70);  // sets the top bit of all other upper halves
  for (int64_t t = 0; t < count; ++t) {
    const __m256i off = _mm256_xor_si256(c, _mm256_set1_epi8(char(t << 4)));
    const __m256i index = _mm256_adds_epu8(off, others);
    low = _mm256_or_si256(low, _mm256_shuffle_epi8(tables[t].low, index));
    high = _mm256_or_si256(high, _mm256_shuffle_epi8(tables[t].high, index));
  }
  return {low, high};
}

// The sum of what both halves stand for.
inline Looked added_up(const Table& low, const Table& high, const uint8_t* codes) {
  const __m256i c = codes_at(codes), half = _mm256_set1_epi8(15);
  Looked sum = looked_up(low, _mm256_and_si256(c, half));
  const Looked more = looked_up(high, _mm256_and_si256(_mm256_srli_epi16(c, 4), half));
  sum.first = _mm256_add_epi16(sum.first, more.first);
  sum.second = _mm256_add_epi16(sum.second, more.second);
  return sum;
}

struct Sum {
  __m256 v = _mm256_setzero_ps();
  void add(const Looked& w, const int16_t* ints, float by) {
    const __m256i* x = reinterpret_cast<const __m256i*>(ints);
    // Two products fit 32 bits, four do not.
    const __m256i first = _mm256_madd_epi16(w.first, _mm256_loadu_si256(x));
    const __m256i second = _mm256_madd_epi16(w.second, _mm256_loadu_si256(x + 1));
    const __m256 sum = _mm256_add_ps(_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second));
    v = _mm256_fmadd_ps(sum, _mm256_set1_ps(by), v);
  }
  float value() const { return folded(v); }
};

#else

struct Table {
  int16_t levels[16];
  Table() = default;
  Table(const float* from, float by) {
    for (int i = 0; i < 16; ++i) levels[i] = int16_t(int32_t(std::nearbyint(from[i] * by)));
  }
};

inline Table subset_sums(const float* weights, float start) {
  float sums[16];
  for (int n = 0; n < 16; ++n) {
    sums[n] = start;
    for (int bit = 0; bit < 4; ++bit) sums[n] += float(n >> bit & 1) * weights[8 * bit];
  }
  return {sums, 1.0f};
}

struct Looked {
  int16_t weights[kBlock];
};

inline Looked looked_up(const Table* tables, int64_t, const uint8_t* codes) {
  Looked out;
  for (int64_t i = 0; i < kBlock; ++i) out.weights[i] = tables[codes[i] / 16].levels[codes[i] % 16];
  return out;
}

inline Looked added_up(const Table& low, const Table& high, const uint8_t* codes) {
  Looked out;
  for (int64_t i = 0; i < kBlock; ++i)
    out.weights[i] = int16_t(low.levels[codes[i] % 16] + high.levels[codes[i] / 16]);
  return out;
}

struct Sum {
  float v = 0;
  void add(const Looked& w, const int16_t* ints, float by) {
    int64_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) sum += int64_t(1) * w.weights[i] * ints[place(kNested, i)];
    v += float(sum) * by;
  }
  float value() const { return v; }
};

#endif

using Eight = float __attribute__((vector_size(32)));

// Eight of the float16 numbers from place i on; zeros after the last of all.
inline Eight eight_halves(const Matrix& m, int64_t i) {
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + i;
#if defined(__AVX2__) && defined(__F16C__)
  if (i + 8 <= m.groups)
    return Eight(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
#endif
  Eight out;
  for (int64_t j = 0; j < 8; ++j) out[j] = i + j < m.groups ? half_value(halves[j]) : 0.0f;
  return out;
}

// What the bits of signs or trits add, in eight groups, as parts of their largest levels.
struct Groups {
  Eight weights[8] = {};  // of the bit of the last plane, and so on
  Eight starts[2], scales;

  // Those of groups i to i + 7 of all.
  void take(const Matrix& m, int64_t i) {
    const bool trits = m.bits == kTrits;
    const int64_t scaled = trits ? m.planes / 2 : m.planes, count = m.groups / scaled;
    Eight largest = {};
    starts[0] = starts[1] = largest;
    for (int64_t p = 0; p < scaled; ++p) {
      const Eight a = eight_halves(m, p * count + i);
      const int64_t bit = m.planes - 1 - (trits ? 2 * p : p);
      if (trits) {
        weights[bit] = -2 * a;
        weights[bit - 1] = a;
        largest += 2 * a;
      } else {
        weights[bit] = 2 * a;
        starts[bit / 4] -= a;
        largest += a;
      }
    }
    scales = largest / kLargestLevel;
    const Eight by = largest > 0 ? kLargestLevel / largest : Eight{};
    for (Eight& start : starts) start *= by;
    for (int64_t bit = 0; bit < m.planes; ++bit) weights[bit] *= by;
  }
};

// Makes tables of the levels of a row of nested codes; returns their scale.
inline float row_tables(const Matrix& m, int64_t row, Table* tables) {
  const int64_t n = int64_t(1) << m.planes;
  alignas(32) float levels[kMostLevels];
  float largest = 0, poison = 0;
  for (int64_t i = 0; i < n; i += 8) {
    const Eight some = eight_halves(m, row * n + i);
    std::memcpy(levels + i, &some, sizeof(some));
  }
  for (int64_t i = n; i < 16; ++i) levels[i] = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t i = 0; i < n; ++i) {
    const float size = levels[i] < 0 ? -levels[i] : levels[i];
    largest = size > largest ? size : largest;
    poison += levels[i] * 0.0f;
  }
  const float by = largest > 0 ? kLargestLevel / largest : 0.0f;
  for (int64_t i = 0; i < n; i += 16) tables[i / 16] = Table(levels + i, by);
  return largest / kLargestLevel + poison;
}

// -- products ------------------------------------------------------------------------------------

template <int B>
void plane_dot(const Matrix& m, int64_t row, int64_t K, const Packable* x, float* sums) {
  uint8_t codes[kWidest];
  row_codes(m, row, K, codes);
  Sum sum[B];
  float base[B] = {};
  const auto add = [&](const Looked& w, int64_t k, float scale) {
    for (int b = 0; b < B; ++b) sum[b].add(w, x[b].ints + k, scale * x[b].scales[k / kBlock]);
  };
  if (m.bits == kNested) {
    Table tables[kMostLevels / 16];
    const float scale = row_tables(m, row, tables);
    const int64_t count = m.planes > 4 ? int64_t(1) << (m.planes - 4) : 1;
    for (int64_t k = 0; k < K; k += kBlock) add(looked_up(tables, count, codes + k), k, scale);
  } else {
    const int64_t count = (K + m.group - 1) / m.group;
    const float* bases = static_cast<const float*>(m.zeros);
    Groups groups;
    const float* weights = reinterpret_cast<const float*>(groups.weights);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t i = row * count + g, own = g % 8;
      if (!own) groups.take(m, i);
      const Table low = subset_sums(weights + own, groups.starts[0][own]);
      const int64_t begin = g * m.group, end = std::min(begin + m.group, K);
      if (m.planes <= 4) {
        for (int64_t k = begin; k < end; k += kBlock)
          add(looked_up(&low, 1, codes + k), k, groups.scales[own]);
      } else {
        const Table high = subset_sums(weights + 32 + own, groups.starts[1][own]);
        for (int64_t k = begin; k < end; k += kBlock)
          add(added_up(low, high, codes + k), k, groups.scales[own]);
      }
      for (int64_t k = begin; k < end && bases; k += kBlock)
        for (int b = 0; b < B; ++b) base[b] += bases[i] * x[b].totals[k / kBlock];
    }
  }
  for (int b = 0; b < B; ++b) sums[b] = sum[b].value() + base[b];
}

// sums[i][b] = <row + i, x[b]> for `count` rows and any number of vectors.
inline void plane_dots(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x,
                       int batch, float* sums) {
  for (int64_t i = row; i < row + count; ++i, sums += batch) {
    int b = 0;
    for (; b + 4 <= batch; b += 4) plane_dot<4>(m, i, K, x + b, sums + b);
    for (; b < batch; ++b) plane_dot<1>(m, i, K, x + b, sums + b);
  }
}

}  // namespace
