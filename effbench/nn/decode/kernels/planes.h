// Products of one row of bit planes and some vectors, without expanding the row.
//
// How bits lie is said in effbench/nn/quant/planes.py. A code of up to 8 bits is put together from
// its planes, one byte a column, and what it stands for is looked up in tables of 16-bit integers:
//   signs, trits  w = base + sum over planes i of c_i bit_i, with a c_i for each group of a row:
//                 two tables of 16 sums, one for each half of the code
//   nested        w = level of the code, 2^b of them for each row
// Vectors are those of packed.h. Of a weight half of the largest sum / 32766 is lost. Where the CPU
// multiplies bfloat16, nested levels are rounded to it instead, for vectors of that dtype.

#pragma once

#include "packed.h"
#include "products.h"

namespace {

constexpr int64_t kSpan = 256;        // columns whose bits stand together in a plane
constexpr float kLargestLevel = 32766;  // two levels, rounded, add up to a 16-bit integer
constexpr int64_t kMostLevels = 256;
#if defined(WIDE)
constexpr int64_t kLooked = 64;  // columns that are looked up at a time, or as many as there are
#else
constexpr int64_t kLooked = 32;
#endif

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

// Stores the codes of some blocks: one block after the other, or, where 64 are looked up at a time, eight
// codes of one beside eight of the next, in the order of `place`.
inline void stored(const __m256i* blocks, int64_t count, uint8_t* codes) {
#if defined(WIDE)
  const __m512i eights = _mm512_setr_epi64(0, 8, 2, 10, 1, 9, 3, 11);
  for (int64_t k = 0; k < count; k += 2)
    _mm512_store_si512(codes + 32 * k, _mm512_permutex2var_epi64(_mm512_castsi256_si512(blocks[k]), eights,
                                                                _mm512_castsi256_si512(blocks[k + 1])));
#else
  for (int64_t k = 0; k < count; ++k)
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 32 * k), blocks[k]);
#endif
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

template <int kPlanes>
void tail_codes(const Matrix& m, int64_t row, int64_t K, int64_t start, uint8_t* codes) {
  static const Tail kTails[7] = {Tail(4),  Tail(8),  Tail(12), Tail(16),
                                 Tail(20), Tail(24), Tail(28)};
  const int64_t columns = K - start, words = columns / 32;
  const Tail& tail = kTails[words - 1];
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(words)), lanes);
  const __m256i one = _mm256_set1_epi8(1);
  __m256i planes[8], found[8];
  for (int64_t i = 0; i < kPlanes; ++i)
    planes[i] = _mm256_maskload_epi32(
        reinterpret_cast<const int*>(plane_at(m, i, row, K) + start / 8), mask);
  for (int64_t block = 0; block < words; ++block) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail.word[block]));
    const __m256i shift = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail.shift[block]));
    __m256i code = _mm256_setzero_si256();
    for (int64_t i = 0; i < kPlanes; ++i) {
      const __m256i bits = _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(planes[i], word), shift);
      code = _mm256_or_si256(_mm256_add_epi8(code, code), _mm256_and_si256(bits, one));
    }
    found[block] = code;
  }
  found[words] = _mm256_setzero_si256();
  stored(found, words, codes + start);
}

// The codes of a row, a byte each; K is a multiple of 32.
template <int kPlanes>
void row_codes(const Matrix& m, int64_t row, int64_t K, uint8_t* codes) {
  constexpr int64_t first = 8 - kPlanes;  // of eight planes, the ones in front are zeros
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
    stored(codes_low, 8, codes + start);
  }
  if (start < K) tail_codes<kPlanes>(m, row, K, start, codes);
}

inline void row_codes(const Matrix& m, int64_t row, int64_t K, uint8_t* codes) {
  switch (m.planes) {
    case 1: return row_codes<1>(m, row, K, codes);
    case 2: return row_codes<2>(m, row, K, codes);
    case 3: return row_codes<3>(m, row, K, codes);
    case 4: return row_codes<4>(m, row, K, codes);
    case 5: return row_codes<5>(m, row, K, codes);
    case 6: return row_codes<6>(m, row, K, codes);
    case 7: return row_codes<7>(m, row, K, codes);
    default: return row_codes<8>(m, row, K, codes);
  }
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

#if defined(WIDE)

// Up to 64 levels as 16-bit integers, their lower and their upper bytes; with Table(...), sixteen of them,
// four times.
struct Table {
  __m512i low, high;
  Table() = default;
  explicit Table(__m512 levels) {
    const __m512i whole = _mm512_cvtps_epi32(levels);
    const __m512i first = _mm512_set4_epi32(0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    low = _mm512_permutexvar_epi8(first, whole);
    high = _mm512_permutexvar_epi8(_mm512_add_epi8(first, _mm512_set1_epi8(1)), whole);
  }
  // Of `count` levels, 16, 32 or 64.
  Table(const __m512* levels, int64_t count, float by) {
    if (count == 16) {
      *this = Table(_mm512_mul_ps(levels[0], _mm512_set1_ps(by)));
      return;
    }
    __m128i bytes[2][4] = {};
    for (int64_t i = 0; i < count / 16; ++i) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(levels[i], _mm512_set1_ps(by)));
      bytes[0][i] = _mm512_cvtepi32_epi8(whole);
      bytes[1][i] = _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8));
    }
    *this = Table(bytes);
  }
  // Of the lower and the upper bytes of levels.
  explicit Table(const __m128i (*bytes)[4]) : low(joined(bytes[0])), high(joined(bytes[1])) {}
  static __m512i joined(const __m128i* four) {
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(four[0]), four[1], 1);
    const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(four[2]), four[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }
};
constexpr int64_t kTable = 64;  // levels of a table of nested codes

// The sums of all subsets of four weights, 8 apart, and `start`.
inline Table subset_sums(const float* weights, float start) {
  __m512 sums = _mm512_set1_ps(start);
  const auto add = [&](int bit, __mmask16 with) {
    sums = _mm512_mask_add_ps(sums, with, sums, _mm512_set1_ps(weights[8 * bit]));
  };
  add(0, 0xaaaa);
  add(1, 0xcccc);
  add(2, 0xf0f0);
  add(3, 0xff00);
  return Table(sums);
}

// What 64 codes stand for: those of one block and of the next.
struct Looked {
  __m512i first, second;
  Looked(__m512i low, __m512i high)
      : first(_mm512_unpacklo_epi8(low, high)), second(_mm512_unpackhi_epi8(low, high)) {}
};

inline __m512i codes_at(const uint8_t* codes) { return _mm512_load_si512(codes); }

// Of one table, or of two or four: the upper bits of a code are the number of its own.
constexpr int kMostTables = 4;
template <int kTables>
__attribute__((always_inline)) inline Looked looked_up(const Table* t, int64_t, const uint8_t* codes) {
  const __m512i c = codes_at(codes);
  if constexpr (kTables == 1) {
    return {_mm512_permutexvar_epi8(c, t[0].low), _mm512_permutexvar_epi8(c, t[0].high)};
  } else {
    __m512i low = _mm512_permutex2var_epi8(t[0].low, c, t[1].low);
    __m512i high = _mm512_permutex2var_epi8(t[0].high, c, t[1].high);
    if constexpr (kTables == 4) {
      const __mmask64 far = _mm512_movepi8_mask(c);
      low = _mm512_mask_mov_epi8(low, far, _mm512_permutex2var_epi8(t[2].low, c, t[3].low));
      high = _mm512_mask_mov_epi8(high, far, _mm512_permutex2var_epi8(t[2].high, c, t[3].high));
    }
    return {low, high};
  }
}

// Of sixteen levels.
inline Looked looked_up(const Table& table, __m512i codes) {
  return {_mm512_shuffle_epi8(table.low, codes), _mm512_shuffle_epi8(table.high, codes)};
}
inline Looked few_looked_up(const Table& table, const uint8_t* codes) {
  return looked_up(table, codes_at(codes));
}

// The sum of what both halves stand for.
inline Looked added_up(const Table& low, const Table& high, const uint8_t* codes) {
  const __m512i c = codes_at(codes), half = _mm512_set1_epi8(15);
  Looked sum = looked_up(low, _mm512_and_si512(c, half));
  const Looked more = looked_up(high, _mm512_and_si512(_mm512_srli_epi16(c, 4), half));
  sum.first = _mm512_add_epi16(sum.first, more.first);
  sum.second = _mm512_add_epi16(sum.second, more.second);
  return sum;
}

#if defined(NATIVE_BF16)
#define BF16_LEVELS 1
#endif

// Sums of products with columns that share a scale, several at a time: one sum waits for the one before.
// `plain` ones are of levels and vectors in bfloat16.
template <bool plain>
struct SumOf {
  __m512 parts[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  template <int64_t kBlocks>
  __attribute__((always_inline)) void add(const Looked& w, const Packable& x, int64_t k, int turn) {
    block(2 * turn, w.first, x, k);
    if constexpr (kBlocks == 2) block(2 * turn + 1, w.second, x, k + kBlock);
  }
  __attribute__((always_inline)) void block(int i, __m512i weights, const Packable& x, int64_t k) {
    const __m512i own = _mm512_loadu_si512(x.ints + k);
#if defined(BF16_LEVELS)
    if constexpr (plain) {
      parts[i] = Dot<bf16, 1>::added(parts[i], weights, own);
      return;
    }
#endif
    // Two products fit 32 bits, four do not.
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_madd_epi16(weights, own));
    parts[i] = _mm512_fmadd_ps(sum, _mm512_set1_ps(x.scales[uint64_t(k) / kBlock]), parts[i]);
  }
};
using Sum = SumOf<false>;

struct Total {
  __m512 v = _mm512_setzero_ps();
  template <typename S>
  void add(const S& sum, float scale) {
    const __m512 low = _mm512_add_ps(sum.parts[0], sum.parts[1]);
    const __m512 all = _mm512_add_ps(low, _mm512_add_ps(sum.parts[2], sum.parts[3]));
    v = _mm512_fmadd_ps(all, _mm512_set1_ps(scale), v);
  }
  float value() const { return _mm512_reduce_add_ps(v); }
};

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

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
  Table(const float* levels, int64_t, float by)
      : Table(_mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(by)),
              _mm256_mul_ps(_mm256_loadu_ps(levels + 8), _mm256_set1_ps(by))) {}
};
constexpr int64_t kTable = 16;

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
inline Looked few_looked_up(const Table& table, const uint8_t* codes) {
  return looked_up(table, codes_at(codes));
}

// Of one table, or of several: one counts where the upper half of a code is its number.
constexpr int kMostTables = 16;
template <int kTables>
__attribute__((always_inline)) inline Looked looked_up(const Table* tables, int64_t count, const uint8_t* codes) {
  const __m256i c = codes_at(codes);
  if (kTables == 1) return looked_up(tables[0], c);
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
  __m256 parts[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  template <int64_t>
  __attribute__((always_inline)) void add(const Looked& w, const Packable& x, int64_t k, int turn) {
    const __m256i* ints = reinterpret_cast<const __m256i*>(x.ints + k);
    // Two products fit 32 bits, four do not.
    const __m256i first = _mm256_madd_epi16(w.first, _mm256_loadu_si256(ints));
    const __m256i second = _mm256_madd_epi16(w.second, _mm256_loadu_si256(ints + 1));
    const __m256 sum = _mm256_add_ps(_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second));
    parts[turn] = _mm256_fmadd_ps(sum, _mm256_set1_ps(x.scales[uint64_t(k) / kBlock]), parts[turn]);
  }
};

struct Total {
  __m256 v = _mm256_setzero_ps();
  void add(const Sum& sum, float scale) {
    v = _mm256_fmadd_ps(_mm256_add_ps(sum.parts[0], sum.parts[1]), _mm256_set1_ps(scale), v);
  }
  float value() const { return folded(v); }
};

#else

struct Table {
  int16_t levels[16];
  Table() = default;
  Table(const float* from, int64_t, float by) {
    for (int i = 0; i < 16; ++i) levels[i] = int16_t(int32_t(std::nearbyint(from[i] * by)));
  }
};
constexpr int64_t kTable = 16;

inline Table subset_sums(const float* weights, float start) {
  float sums[16];
  for (int n = 0; n < 16; ++n) {
    sums[n] = start;
    for (int bit = 0; bit < 4; ++bit) sums[n] += float(n >> bit & 1) * weights[8 * bit];
  }
  return {sums, 16, 1.0f};
}

struct Looked {
  int16_t weights[kBlock];
};

constexpr int kMostTables = 16;
template <int>
inline Looked looked_up(const Table* tables, int64_t, const uint8_t* codes) {
  Looked out;
  for (int64_t i = 0; i < kBlock; ++i) out.weights[i] = tables[codes[i] / 16].levels[codes[i] % 16];
  return out;
}

inline Looked few_looked_up(const Table& table, const uint8_t* codes) {
  return looked_up<1>(&table, 1, codes);
}

inline Looked added_up(const Table& low, const Table& high, const uint8_t* codes) {
  Looked out;
  for (int64_t i = 0; i < kBlock; ++i)
    out.weights[i] = int16_t(low.levels[codes[i] % 16] + high.levels[codes[i] / 16]);
  return out;
}

struct Sum {
  float v = 0;
  template <int64_t>
  void add(const Looked& w, const Packable& x, int64_t k, int) {
    int64_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i)
      sum += int64_t(1) * w.weights[i] * x.ints[k + i];
    v += float(sum) * x.scales[uint64_t(k) / kBlock];
  }
};

struct Total {
  float v = 0;
  void add(const Sum& sum, float scale) { v += sum.v * scale; }
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
#if defined(WIDE)
inline float row_tables(const Matrix& m, int64_t row, Table* tables) {
  const int64_t n = int64_t(1) << m.planes;
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + row * n;
  __m512 levels[kMostLevels / 16], largest = _mm512_setzero_ps(), poison = largest;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = __mmask16(n < 16 ? (1 << n) - 1 : 0xffff);
    levels[i / 16] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves + i));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(levels[i / 16]));
    poison = _mm512_fmadd_ps(levels[i / 16], _mm512_setzero_ps(), poison);
  }
  const float most = _mm512_reduce_max_ps(largest), by = most > 0 ? kLargestLevel / most : 0.0f;
  for (int64_t i = 0; i < n; i += kTable)
    tables[i / kTable] = Table(levels + i / 16, std::min(kTable, std::max<int64_t>(n, 16)), by);
  return most / kLargestLevel + _mm512_reduce_add_ps(poison);
}
#else
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
  for (int64_t i = 0; i < n; i += kTable)
    tables[i / kTable] = Table(levels + i, std::min(kTable, n - i), by);
  return largest / kLargestLevel + poison;
}
#endif

// Whether vectors of this dtype meet nested levels as they are: those of bfloat16, which levels are then
// rounded to, as an expanded weight is.
template <typename T>
constexpr bool as_they_are(int64_t bits) {
#if defined(BF16_LEVELS)
  return bits == kNested && std::is_same_v<T, bf16>;
#else
  return bits < 0;
#endif
}

// A vector in the order of planes' codes, in place of its integers.
inline void in_order(const bf16* x, int64_t K, int16_t* ints) {
  alignas(64) int16_t plain[64];
  for (int64_t start = 0; start < padded(K); start += 64) {
    const int64_t count = std::min<int64_t>(64, std::max<int64_t>(K - start, 0));
    std::memset(plain, 0, sizeof(plain));
    std::memcpy(plain, x + start, size_t(count) * sizeof(bf16));
    placed(kNested, plain, start, ints);
  }
}

#if defined(BF16_LEVELS)
// Makes tables of the levels of a row of nested codes, in bfloat16.
inline void plain_tables(const Matrix& m, int64_t row, Table* tables) {
  const int64_t n = int64_t(1) << m.planes;
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + row * n;
  for (int64_t i = 0; i < n; i += kTable) {
    __m128i bytes[2][4] = {};
    for (int64_t j = 0; j < kTable && i + j < n; j += 16) {
      const __mmask16 there = __mmask16(n < 16 ? (1 << n) - 1 : 0xffff);
      const __m512 levels = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves + i + j));
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(levels));
      bytes[0][j / 16] = _mm256_cvtepi16_epi8(rounded);
      bytes[1][j / 16] = _mm256_cvtepi16_epi8(_mm256_srli_epi16(rounded, 8));
    }
    tables[i / kTable] = Table(bytes);
  }
}
#endif

// -- products ------------------------------------------------------------------------------------

// Adds to `totals` the products of columns `begin` to `end` - 1, which share a scale; `look` is what codes
// stand for.
template <int B, typename S = Sum, typename Look>
__attribute__((always_inline)) inline void stretch(const uint8_t* codes, int64_t begin, int64_t end,
                                                   const Packable* x, float scale, Look look, Total* totals) {
  S sums[B];
  const auto add = [&](auto blocks, int64_t k, int turn) __attribute__((always_inline)) {
    const Looked weights = look(codes + k);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b].template add<decltype(blocks)::value>(weights, x[b], k, turn);
  };
  using Whole = std::integral_constant<int64_t, kLooked / kBlock>;
  int64_t k = begin;
#if defined(WIDE)
  if (k % kLooked) {  // a group of one block begins or ends within a register
    const Looked weights = look(codes + k - kBlock);
    for (int b = 0; b < B; ++b) sums[b].block(0, weights.second, x[b], k);
    k += kBlock;
  }
#endif
  for (; k + 2 * kLooked <= end; k += 2 * kLooked) {
    add(Whole(), k, 0);
    add(Whole(), k + kLooked, 1);
  }
  for (; k + kLooked <= end; k += kLooked) add(Whole(), k, 0);
  if (k < end) add(std::integral_constant<int64_t, 1>(), k, 1);
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) totals[b].add(sums[b], scale);
}

constexpr int64_t kTogether = 16;  // rows whose tables are made before their products

// sums[i][b] = <row + i, x[b]> for `count` rows of nested codes, `stride` numbers between two of them.
template <int B, int kTables, bool plain>
__attribute__((noinline)) void nested_rows(const Matrix& m, int64_t row, int64_t count, int64_t K,
                                           const Packable* x, float* sums, int64_t stride) {
  alignas(64) uint8_t codes[kWidest + kLooked];
  const int64_t used = ((int64_t(1) << m.planes) + kTable - 1) / kTable;
  Table tables[kTogether * kTables];
  float scales[kTogether];
  Total totals[kTogether * B];
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t some = std::min(count - begin, kTogether);
    for (int64_t i = 0; i < some; ++i) {
#if defined(BF16_LEVELS)
      if constexpr (plain) {
        plain_tables(m, row + begin + i, tables + i * kTables);
        continue;
      }
#endif
      scales[i] = row_tables(m, row + begin + i, tables + i * kTables);
    }
    for (int64_t i = 0; i < some; ++i) {
      row_codes(m, row + begin + i, K, codes);
      const auto look = [&](const uint8_t* c) __attribute__((always_inline)) {
        return looked_up<kTables>(tables + i * kTables, used, c);
      };
      for (int b = 0; b < B; ++b) totals[i * B + b] = Total();
#if defined(BF16_LEVELS)
      if constexpr (plain) stretch<B, SumOf<true>>(codes, 0, K, x, 1.0f, look, totals + i * B);
      else
#endif
        stretch<B>(codes, 0, K, x, scales[i], look, totals + i * B);
    }
    for (int64_t i = 0; i < some; ++i)  // after all of them, for they wait for each other no more
      for (int b = 0; b < B; ++b) sums[(begin + i) * stride + b] = totals[i * B + b].value();
  }
}

// The same for signs and trits.
template <int B>
__attribute__((noinline)) void sum_rows(const Matrix& m, int64_t row, int64_t rows, int64_t K,
                                        const Packable* x, float* sums, int64_t stride) {
  alignas(64) uint8_t codes[kWidest + kLooked];
  const int64_t count = (K + m.group - 1) / m.group;
  const float* bases = static_cast<const float*>(m.zeros);
  for (int64_t end_row = row + rows; row < end_row; ++row, sums += stride) {
    row_codes(m, row, K, codes);
    Total totals[B];
    float base[B] = {};
    Groups groups;
    const float* weights = reinterpret_cast<const float*>(groups.weights);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t i = row * count + g, own = g % 8;
      if (!own) groups.take(m, i);
      const Table low = subset_sums(weights + own, groups.starts[0][own]);
      const int64_t begin = g * m.group, end = std::min(begin + m.group, K);
      if (m.planes <= 4) {
        stretch<B>(codes, begin, end, x, groups.scales[own], [&](const uint8_t* c) __attribute__((always_inline)) {
          return few_looked_up(low, c);
        }, totals);
      } else {
        const Table high = subset_sums(weights + 32 + own, groups.starts[1][own]);
        stretch<B>(codes, begin, end, x, groups.scales[own], [&](const uint8_t* c) __attribute__((always_inline)) {
          return added_up(low, high, c);
        }, totals);
      }
      for (int64_t k = begin; k < end && bases; k += kBlock)
        for (int b = 0; b < B; ++b) base[b] += bases[i] * x[b].totals[k / kBlock];
    }
    for (int b = 0; b < B; ++b) sums[b] = totals[b].value() + base[b];
  }
}

template <int B, bool plain>
void plane_rows(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x, float* sums,
                int64_t stride) {
  const int64_t levels = int64_t(1) << m.planes;
  if (m.bits != kNested) sum_rows<B>(m, row, count, K, x, sums, stride);
  else if (levels <= kTable) nested_rows<B, 1, plain>(m, row, count, K, x, sums, stride);
  else if (levels <= 2 * kTable) nested_rows<B, 2, plain>(m, row, count, K, x, sums, stride);
  else nested_rows<B, kMostTables, plain>(m, row, count, K, x, sums, stride);
}

// sums[i][b] = <row + i, x[b]> for `count` rows and any number of vectors of dtype T.
template <typename T>
void plane_dots(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x, int batch,
                float* sums) {
  constexpr bool plain = as_they_are<T>(kNested);
  int b = 0;
  for (; b + 4 <= batch; b += 4) plane_rows<4, plain>(m, row, count, K, x + b, sums + b, batch);
  for (; b < batch; ++b) plane_rows<1, plain>(m, row, count, K, x + b, sums + b, batch);
}

}  // namespace
