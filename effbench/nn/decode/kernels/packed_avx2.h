// Products of packed rows on machines with AVX2, FMA and F16C.

#pragma once

#include "packed.h"

namespace {

// Where block i of 8stands among their sums: with nibbles, those with even numbers come first.
constexpr int64_t block_place(int64_t bits, int64_t i) {
  return in_nibbles(bits) ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i;
}

// Sixteen 16-bit integers of each parity, of 32 in a row.
inline void by_parity(__m256i first, __m256i second, __m256i* even, __m256i* odd) {
  const __m256i a = _mm256_srai_epi32(_mm256_slli_epi32(first, 16), 16);
  const __m256i b = _mm256_srai_epi32(_mm256_slli_epi32(second, 16), 16);
  *even = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  *odd = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16)), 0xd8);
}

// The integers of 64 numbers from `start` on, at their places: with nibbles, number 4 j + q is lane j of
// register q for groupwise codes; NF4's are looked up bytewise, the even ones in the high halves, and so are
// those of planes, in the order of columns; those of windows stand in that order anyway.
inline void placed(int64_t bits, const int16_t* plain, int64_t start, int16_t* ints) {
#if defined(WIDE)
  if (in_windows(bits)) return bytes_placed(plain, ints + start);
#endif
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
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(ints + start) + i, out[i]);
}

// Scales of groups i to i + 7 near the last of all, and what a zero point or shift takes from a sum, as
// a multiple of its numbers; 0 beyond the last.
__attribute__((noinline)) inline void last_factors(const Matrix& m, int64_t i, __m256* scale,
                                                   __m256* less) {
  alignas(32) float near[2][8] = {};
  for (int64_t j = 0; j < 8 && i + j < m.groups; ++j) {
    group_scale(m, i + j, near[0] + j, near[1] + j);
    near[1][j] = m.planes == kShifts ? -near[1][j] : near[0][j] * near[1][j];
  }
  *scale = _mm256_load_ps(near[0]);
  *less = _mm256_load_ps(near[1]);
}

// Which of eight blocks stands at each place; see `block_place`.
template <int64_t kBits>
inline __m256i blocks_in_place() {
  return in_nibbles(kBits) ? _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)
                           : _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}

// The zero points of groups i to i + 7, those of codes of 4 bits as `blocks_in_place` if `placed`.
template <int64_t kBits, bool placed>
__attribute__((always_inline)) inline __m256i zero_points(const uint8_t* zeros, int64_t i) {
  if constexpr (kBits == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + i)));
  } else if constexpr (kBits == 4) {
    uint64_t bytes;
    std::memcpy(&bytes, zeros + (i >> 1), 8);
    const __m256i shifts = placed ? _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28)
                                  : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i all = _mm256_set1_epi32(int32_t(uint32_t(bytes >> ((i & 1) * 4))));
    return _mm256_and_si256(_mm256_srlv_epi32(all, shifts), _mm256_set1_epi32(15));
  } else {
    alignas(32) int32_t eight[8];
    for (int64_t j = 0; j < 8; ++j) eight[j] = code_at(zeros, i + j, kBits);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(eight));
  }
}

// As `last_factors` for any groups; those beyond the last are what lies there, or 0.
template <int64_t kBits, bool placed>
__attribute__((always_inline)) inline void eight_factors(const Matrix& m, int64_t i, __m256* scale,
                                                        __m256* less) {
  const auto in_place = [](__m256 natural) __attribute__((always_inline)) {
    if constexpr (placed && in_nibbles(kBits))
      return _mm256_permutevar8x32_ps(natural, blocks_in_place<kBits>());
    else
      return natural;
  };
  if (__builtin_expect(i + 16 > m.groups, 0)) {
    last_factors(m, i, scale, less);
    *scale = in_place(*scale);
    *less = in_place(*less);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + i;
  *scale = in_place(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
  if (m.planes == kShifts) {
    const uint16_t* own = static_cast<const uint16_t*>(m.zeros) + i;
    const __m256 shifts =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
    *less = in_place(_mm256_sub_ps(_mm256_setzero_ps(), shifts));
  } else if (m.zeros) {
    const uint8_t* zeros = static_cast<const uint8_t*>(m.zeros);
    *less = _mm256_mul_ps(*scale, _mm256_cvtepi32_ps(zero_points<kBits, placed>(zeros, i)));
  } else {
    *less = _mm256_mul_ps(*scale, _mm256_set1_ps(float((int64_t(1) << (kBits - 1)) - 1)));
  }
}

// What the sums of a row's blocks are multiplied by, and what is taken from them as a multiple of the
// vectors' sums: eight at a time, in the order of `block_place`. For rows of one matrix.
template <int64_t kBits>
class Factors {
 public:
  Factors(const Matrix& m, int64_t K)
      : m_(m), columns_(K), groups_((K + m.group - 1) / m.group), per_(m.group / kBlock),
        direct_(kBits != kNF4 && per_ == 1), lanes_(blocks_in_place<kBits>()) {
    if (kBits == kNF4 || per_ & (per_ - 1)) return;
    shift_ = __builtin_ctzll(uint64_t(per_));
    lanes_ = _mm256_srl_epi32(lanes_, _mm_cvtsi32_si128(shift_));
  }

  __attribute__((always_inline)) void take(int64_t row) {
    first_ = row * groups_;
    if constexpr (kBits == kNF4) {
      nf4_scales(m_, row, columns_, scales_);
    } else if (!direct_) {
      for (int64_t i = 0; i < groups_; i += 8) {
        __m256 scale, less;
        eight_factors<kBits, false>(m_, first_ + i, &scale, &less);
        _mm256_storeu_ps(scales_ + i, scale);
        _mm256_storeu_ps(less_ + i, less);
      }
      if (per_ & (per_ - 1)) spread();
    }
  }

  // Those of blocks i to i + 7, i a multiple of 8; nothing is said of blocks after the last.
  __attribute__((always_inline)) void of(int64_t i, __m256* scale, __m256* less) const {
    if constexpr (kBits != kNF4)
      if (direct_) return eight_factors<kBits, true>(m_, first_ + i, scale, less);
    *scale = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales_ + (i >> shift_)), lanes_);
    if constexpr (kBits != kNF4)
      *less = _mm256_permutevar8x32_ps(_mm256_loadu_ps(less_ + (i >> shift_)), lanes_);
  }

 private:
  // Gives each block those of its group.
  __attribute__((noinline)) void spread() {
    for (int64_t g = groups_; g-- > 0;)
      for (int64_t i = std::min(per_, columns_ / kBlock - g * per_); i-- > 0;) {
        scales_[g * per_ + i] = scales_[g];
        less_[g * per_ + i] = less_[g];
      }
  }

  const Matrix& m_;
  const int64_t columns_, groups_, per_;  // of a row; per_: blocks of a group
  const bool direct_;                     // they are read as they are needed
  int shift_ = 0;                         // two to its power blocks share those that were read
  int64_t first_ = 0;
  __m256i lanes_;
  float scales_[kMostBlocks + 16], less_[kMostBlocks + 16];
};

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

// The codes of a row, or what they stand for, as 16-bit integers.
template <int64_t kBits>
class Codes {
 public:
  static constexpr int64_t kSpan = in_nibbles(kBits) ? 64 : 32;  // codes of a register
  static constexpr int kParts = int(kSpan / 16);

  Codes(const Matrix& m, int64_t K) : all_(static_cast<const uint8_t*>(m.weight)), columns_(K) {
    if constexpr (in_windows(kBits)) end_ = all_ + m.groups / ((K + m.group - 1) / m.group) * K * kBits / 8;
    if constexpr (kBits == kNF4) {
      alignas(16) uint8_t bytes[2][16];
      for (int i = 0; i < 16; ++i) {
        bytes[0][i] = uint8_t(uint16_t(kLevels[i]) & 255);
        bytes[1][i] = uint8_t(uint16_t(kLevels[i]) >> 8);
      }
      lower_ = _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(bytes[0]));
      upper_ = _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(bytes[1]));
    }
  }

  void take(int64_t row) { codes_ = all_ + row * columns_ * kWide / 8; }

  // Those from column k on, in the order of `place`; `inner` if a whole register is there.
  template <bool inner>
  __attribute__((always_inline)) void at(int64_t k, __m256i* part) const {
    if constexpr (kBits == 8) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes_ + k));
      part[0] = _mm256_and_si256(c, _mm256_set1_epi16(255));
      part[1] = _mm256_srli_epi16(c, 8);
    } else if constexpr (kBits == 4) {
      const __m256i c = nibbles_at(codes_ + (k >> 1), inner || k + 64 <= columns_);
      const __m256i low = _mm256_set1_epi16(15);
      part[0] = _mm256_and_si256(c, low);
      part[1] = _mm256_and_si256(_mm256_srli_epi16(c, 4), low);
      part[2] = _mm256_and_si256(_mm256_srli_epi16(c, 8), low);
      part[3] = _mm256_srli_epi16(c, 12);
    } else if constexpr (kBits == kNF4) {
      const __m256i c = nibbles_at(codes_ + (k >> 1), inner || k + 64 <= columns_);
      const __m256i mask = _mm256_set1_epi8(15);
      const __m256i odd = _mm256_and_si256(c, mask);
      const __m256i even = _mm256_and_si256(_mm256_srli_epi16(c, 4), mask);
      const __m256i even_low = _mm256_shuffle_epi8(lower_, even);
      const __m256i even_high = _mm256_shuffle_epi8(upper_, even);
      const __m256i odd_low = _mm256_shuffle_epi8(lower_, odd);
      const __m256i odd_high = _mm256_shuffle_epi8(upper_, odd);
      part[0] = _mm256_unpacklo_epi8(even_low, even_high);
      part[1] = _mm256_unpackhi_epi8(even_low, even_high);
      part[2] = _mm256_unpacklo_epi8(odd_low, odd_high);
      part[3] = _mm256_unpackhi_epi8(odd_low, odd_high);
    } else {
      const int64_t byte = k * kBits / 8;
      for (int i = 0; i < 2; ++i) part[i] = window_.codes(sixteen(byte + i * 2 * kBits));
    }
  }

 private:
  static constexpr int64_t kWide = kBits == kNF4 ? 4 : kBits;

  // 16 bytes, of which those that hold 16 codes count.
  __m128i sixteen(int64_t byte) const {
    if (codes_ + byte + 16 <= end_)
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes_ + byte));
    alignas(16) uint8_t near[16] = {};
    std::memcpy(near, codes_ + byte, 2 * kBits);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(near));
  }

  const uint8_t *all_, *codes_ = nullptr, *end_ = nullptr;  // end_: of windows
  int64_t columns_;
  __m256i lower_, upper_;  // NF4: bytes of the levels
  std::conditional_t<in_windows(kBits), Windows<kBits>, char> window_;
};

// A sum of products: an integer, or, of products with levels, of which 32 do not fit 32 bits, a float32
// number. Both lie in registers of integers.
template <int64_t kBits>
__attribute__((always_inline)) inline __m256i plus(__m256i a, __m256i b) {
  if constexpr (kBits == kNF4)
    return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  else
    return _mm256_add_epi32(a, b);
}
template <int64_t kBits>
__attribute__((always_inline)) inline __m256 as_floats(__m256i sums) {
  return kBits == kNF4 ? _mm256_castsi256_ps(sums) : _mm256_cvtepi32_ps(sums);
}

// Adds neighbours: of a and of b, in turns of two, in each half.
template <int64_t kBits>
__attribute__((always_inline)) inline __m256i pairs_added(__m256i a, __m256i b) {
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  return plus<kBits>(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                     _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
}

// The halves of a, added up, then those of b.
template <int64_t kBits>
__attribute__((always_inline)) inline __m256i halves_added(__m256i a, __m256i b) {
  return plus<kBits>(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// all[b] = sums of the products of the register of codes from column k on; `inner` if all of it is there.
template <int64_t kBits, int B, bool inner>
__attribute__((always_inline)) inline void register_sums(const Codes<kBits>& codes, int64_t k,
                                                        const Packable* x, __m256i* all) {
  constexpr int kParts = Codes<kBits>::kParts;
  __m256i part[kParts];
  codes.template at<inner>(k, part);
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    const __m256i* v = reinterpret_cast<const __m256i*>(x[b].ints + k);
    __m256i sum[kParts];
#pragma GCC unroll 4
    for (int q = 0; q < kParts; ++q)
      sum[q] = _mm256_madd_epi16(part[q], _mm256_loadu_si256(v + q));
    if constexpr (kParts == 4) {
      sum[0] = _mm256_add_epi32(sum[0], sum[1]);
      sum[1] = _mm256_add_epi32(sum[2], sum[3]);
    }
    all[b] = _mm256_add_epi32(sum[0], sum[1]);
    if constexpr (kBits == kNF4) all[b] = _mm256_castps_si256(_mm256_cvtepi32_ps(all[b]));
  }
}

// all[b] = sums of the products of eight blocks from column k on, by `block_place`: those of kCount
// registers after the first kFirst. Only `count` registers are there, unless they are `inner` ones; that is asked
// of each of them where the compiler would else hold more in registers than there are.
template <int64_t kBits, int B, bool inner, int kFirst, int kCount>
__attribute__((always_inline)) inline void block_sums(const Codes<kBits>& codes, int64_t k, int64_t count,
                                                     const Packable* x, __m256i* all) {
  if constexpr (kCount > 1) {
    __m256i more[B];
    block_sums<kBits, B, inner, kFirst, kCount / 2>(codes, k, count, x, all);
    block_sums<kBits, B, inner, kFirst + kCount / 2, kCount / 2>(codes, k, count, x, more);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      all[b] = kCount == 8 ? halves_added<kBits>(all[b], more[b]) : pairs_added<kBits>(all[b], more[b]);
  } else if (inner || kFirst < count) {
    register_sums<kBits, B, inner>(codes, k + kFirst * Codes<kBits>::kSpan, x, all);
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) all[b] = _mm256_setzero_si256();
  }
}

// sums[i][b] = <row + i, x[b]> for `count` rows, `stride` numbers between two of them.
template <int64_t kBits, int B>
__attribute__((noinline)) void register_rows(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x, float* sums,
                 int64_t stride) {
  constexpr int64_t kSpan = Codes<kBits>::kSpan;
  constexpr int kRegisters = int(8 * kBlock / kSpan);
  const int64_t whole = K / (8 * kBlock) * (8 * kBlock), rest = (K - whole + kSpan - 1) / kSpan;
  const __m256 there = _mm256_castsi256_ps(_mm256_cmpgt_epi32(
      _mm256_set1_epi32(int32_t((K - whole) / kBlock)), blocks_in_place<kBits>()));
  Factors<kBits> factors(m, K);
  Codes<kBits> codes(m, K);
  for (int64_t i = 0; i < count; ++i, sums += stride) {
    factors.take(row + i);
    codes.take(row + i);
    __m256i all[B];
    __m256 acc[B], scale, less;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_ps();
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const __m256 dot =
            _mm256_mul_ps(as_floats<kBits>(all[b]), _mm256_loadu_ps(x[b].scales + k / kBlock));
        acc[b] = _mm256_fmadd_ps(scale, dot, acc[b]);
        if constexpr (kBits != kNF4)
          acc[b] = _mm256_fnmadd_ps(less, _mm256_loadu_ps(x[b].totals + k / kBlock), acc[b]);
      }
    };
    for (int64_t k = 0; k < whole; k += 8 * kBlock) {
      block_sums<kBits, B, (B < 4), 0, kRegisters>(codes, k, kRegisters, x, all);
      factors.of(k / kBlock, &scale, &less);
      add(k);
    }
    if (rest) {
      block_sums<kBits, B, false, 0, kRegisters>(codes, whole, rest, x, all);
      factors.of(whole / kBlock, &scale, &less);
      scale = _mm256_and_ps(scale, there);
      less = _mm256_and_ps(less, there);
      add(whole);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b] = folded(acc[b]);
  }
}

// The same for codes in windows, block by block: written out for each number of bits, sums of eight take
// long to compile and gain little beside what the codes take.
template <int64_t kBits, int B>
__attribute__((noinline)) void window_rows(const Matrix& m, int64_t row, int64_t count, int64_t K,
                                           const Packable* x, float* sums, int64_t stride) {
  Factors<kBits> factors(m, K);
  Codes<kBits> codes(m, K);
  for (int64_t i = 0; i < count; ++i, sums += stride) {
    factors.take(row + i);
    codes.take(row + i);
    __m256 acc[B], scale, less;
    __m256i all[B];
    alignas(32) float by[B][8];
    for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_ps();
    for (int64_t k = 0; k < K; k += 8 * kBlock) {
      const int64_t first = k / kBlock, blocks = std::min<int64_t>(8, K / kBlock - first);
      const __m256 there = _mm256_castsi256_ps(
          _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(blocks)), blocks_in_place<kBits>()));
      factors.of(first, &scale, &less);
      less = _mm256_and_ps(less, there);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        _mm256_store_ps(by[b], _mm256_mul_ps(scale, _mm256_loadu_ps(x[b].scales + first)));
        acc[b] = _mm256_fnmadd_ps(less, _mm256_loadu_ps(x[b].totals + first), acc[b]);
      }
      for (int64_t j = 0; j < blocks; ++j) {
        register_sums<kBits, B, true>(codes, k + j * kBlock, x, all);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
          acc[b] = _mm256_fmadd_ps(as_floats<kBits>(all[b]), _mm256_broadcast_ss(by[b] + j), acc[b]);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b] = folded(acc[b]);
  }
}

template <int64_t kBits, int B>
void rows(const Matrix& m, int64_t row, int64_t count, int64_t K, const Packable* x, float* sums, int64_t stride) {
  if constexpr (!in_windows(kBits)) register_rows<kBits, B>(m, row, count, K, x, sums, stride);
#if defined(WIDE)
  else wide_rows<kBits, B>(m, row, count, K, x, sums, stride);
#else
  else window_rows<kBits, B>(m, row, count, K, x, sums, stride);
#endif
}

}  // namespace
