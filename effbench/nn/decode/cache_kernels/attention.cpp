// What one query of each head sees of a cache in codes, without expanding it (coded_attention.py says of
// what). Scores and mixed values are sums over codes, so that ranges are applied to what they are
// multiplied by:
//
//   q k_t       = sum_d (q_d s_d) c_dt + sum_d q_d l_d          keys: a range for each channel of a group
//   sum_t p_t v_t = sum_t (p_t s_t) c_td + sum_t p_t l_t        values: ranges for each token
//
// Tokens go in chunks, each with a softmax of its own, which are put together at the end.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../kernels/numbers.h"

namespace {

constexpr int64_t kChunk = 256;  // tokens of one piece of work; or a group, where that has more
#if defined(__AVX512F__)
constexpr int kMost = 16;  // bytes of codes that are multiplied at once, where so many belong together
#else
constexpr int kMost = 8;
#endif
constexpr int kLeast = 8;  // how many always do

template <int L>
struct Lot {
  typedef float Floats __attribute__((vector_size(4 * L)));
  typedef int32_t Whole __attribute__((vector_size(4 * L)));

  // Bytes as whole numbers; compilers take them apart one by one where they are not told how.
  static Whole of(const uint8_t* bytes) {
#if defined(__AVX512F__)
    if constexpr (L == 16)
      return Whole(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#endif
#if defined(__AVX2__)
    if constexpr (L == 8)
      return Whole(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#endif
    int32_t wide[L];
    for (int i = 0; i < L; ++i) wide[i] = bytes[i];
    Whole out;
    std::memcpy(&out, wide, sizeof(out));
    return out;
  }
};

struct Cache {
  const uint8_t* key_codes;               // [heads, groups, width, size]
  const uint16_t *key_scales, *key_lows;  // [heads, groups, width] float16
  const uint8_t* value_codes;             // [heads, groups, size, width]
  const uint16_t *value_scales, *value_lows;  // [heads, groups, size, width / channels] float16
  const float *keys, *values;             // [heads, recent, width]: as they came
  int64_t heads, groups, size, width, channels, recent;
};

float dot(const float* a, const float* b, int64_t n) {
  Lanes lanes = Lanes::zero();
  int64_t i = 0;
  for (; i + Lanes::kCount <= n; i += Lanes::kCount) lanes = lanes.plus(Lanes::load(a + i), Lanes::load(b + i));
  float sum = lanes.sum();
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// float32 numbers of float16 ones.
void widened(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) {
    const uint32_t sign = uint32_t(x[i] & 0x8000) << 16, rest = x[i] & 0x7fff;
    // As float32 with its exponent 112 too low, where what is below all normal numbers is one too.
    const uint32_t bits = rest < 0x7c00 ? rest << 13 : (rest << 13) | 0x7f800000;
    float found;
    std::memcpy(&found, &bits, 4);
    if (rest < 0x7c00) found *= 5.192296858534828e33f;  // 2^112
    out[i] = sign ? -found : found;
  }
}

// out[i][k][b] += sum over j of by[i][j] code k of byte b of row j, for the L bytes at `codes` of each of
// `count` rows; what belongs to one k lies `apart`, what belongs to one i `stride`.
template <int bits, int L, int N>
void columns(const uint8_t* codes, int64_t row, int64_t count, const float* by, int64_t by_stride, float* out,
             int64_t stride, int64_t apart) {
  using Floats = typename Lot<L>::Floats;
  using Whole = typename Lot<L>::Whole;
  constexpr int kEach = 8 / bits;
  Floats sums[N][kEach];
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < kEach; ++k)
      std::memcpy(&sums[i][k], out + i * stride + k * apart, sizeof(Floats));
  for (int64_t j = 0; j < count; ++j) {
    const Whole whole = Lot<L>::of(codes + j * row);
#pragma GCC unroll 4
    for (int k = 0; k < kEach; ++k) {
      const Whole high = whole >> (k * bits);  // of the last code nothing is above
      const Floats number = __builtin_convertvector(k + 1 < kEach ? high & ((1 << bits) - 1) : high, Floats);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sums[i][k] += by[i * by_stride + j] * number;
    }
  }
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < kEach; ++k)
      std::memcpy(out + i * stride + k * apart, &sums[i][k], sizeof(Floats));
}

// The same for any number of queries.
template <int bits, int L>
void columns(const uint8_t* codes, int64_t row, int64_t count, const float* by, int64_t by_stride, float* out,
             int64_t stride, int64_t apart, int64_t queries) {
  int64_t i = 0;
  for (; i + 3 <= queries; i += 3)
    columns<bits, L, 3>(codes, row, count, by + i * by_stride, by_stride, out + i * stride, stride, apart);
  for (; i < queries; ++i)
    columns<bits, L, 1>(codes, row, count, by + i * by_stride, by_stride, out + i * stride, stride, apart);
}

// The same for `apart` bytes of each row.
template <int bits>
void columns(const uint8_t* codes, int64_t row, int64_t count, const float* by, int64_t by_stride, float* out,
             int64_t stride, int64_t apart, int64_t queries) {
  int64_t b = 0;
  for (; b + kMost <= apart; b += kMost)
    columns<bits, kMost>(codes + b, row, count, by, by_stride, out + b, stride, apart, queries);
  for (; b < apart; b += kLeast)
    columns<bits, kLeast>(codes + b, row, count, by, by_stride, out + b, stride, apart, queries);
}

template <int bits>
struct Attention {
  static constexpr int64_t kEach = 8 / bits;
  const Cache& of;
  const float* queries;  // [heads, each, width]
  int64_t each;          // queries of a head
  float scale;
  float* parts;  // [heads, pieces, each, 2 + width]: largest score, sum of weights, mixed values

  int64_t groups_of_piece() const { return std::max<int64_t>(1, kChunk / of.size); }
  int64_t coded_pieces() const { return (of.groups + groups_of_piece() - 1) / groups_of_piece(); }
  int64_t pieces() const { return coded_pieces() + (of.recent > 0); }

  float* part(int64_t head, int64_t piece, int64_t i) const {
    return parts + ((head * pieces() + piece) * each + i) * (2 + of.width);
  }

  // Scores [each, count] become weights.
  void soften(int64_t head, int64_t piece, float* scores, int64_t count) const {
    for (int64_t i = 0; i < each; ++i) {
      float *own = scores + i * count, largest = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t t = 0; t < count; ++t) {
        own[t] *= scale;
        largest = own[t] > largest ? own[t] : largest;
      }
#pragma omp simd reduction(+ : total)
      for (int64_t t = 0; t < count; ++t) {
        own[t] = exponential(own[t] - largest);
        total += own[t];
      }
      part(head, piece, i)[0] = largest;
      part(head, piece, i)[1] = total;
    }
  }

  // Tokens of a group stand by their place in a byte first: token t = kEach b + k at k bytes + b.
  void coded(int64_t head, int64_t piece) const {
    const int64_t begin = piece * groups_of_piece(), end = std::min(begin + groups_of_piece(), of.groups);
    const int64_t count = (end - begin) * of.size, bytes = of.size / kEach, ranges = of.width / of.channels;
    const int64_t row = of.width / kEach, part_bytes = of.channels / kEach;
    std::vector<float> scores(each * count), by(each * std::max(of.width, of.size));
    std::vector<float> sums(each * of.width), lows(each * ranges), wide(2 * std::max(of.width, ranges * of.size));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t group = head * of.groups + n;
      float *s = wide.data(), *l = s + of.width;
      widened(of.key_scales + group * of.width, of.width, s);
      widened(of.key_lows + group * of.width, of.width, l);
      float* own = scores.data() + (n - begin) * of.size;
      for (int64_t i = 0; i < each; ++i) {
        const float* q = queries + (head * each + i) * of.width;
        for (int64_t d = 0; d < of.width; ++d) by[i * of.width + d] = q[d] * s[d];
        std::fill(own + i * count, own + i * count + of.size, dot(q, l, of.width));
      }
      columns<bits>(of.key_codes + group * of.width * bytes, bytes, of.width, by.data(), of.width, own, count,
                    bytes, each);
    }
    soften(head, piece, scores.data(), count);
    std::vector<float> natural(each * of.size), ranges_of(2 * ranges * of.size);
    float *scales = ranges_of.data(), *lowest = scales + ranges * of.size;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = (head * of.groups + n) * of.size;
      const float *s = wide.data(), *l = s + ranges * of.size;
      widened(of.value_scales + first * ranges, ranges * of.size, wide.data());
      widened(of.value_lows + first * ranges, ranges * of.size, wide.data() + ranges * of.size);
      for (int64_t r = 0; r < ranges; ++r)
        for (int64_t t = 0; t < of.size; ++t) {
          scales[r * of.size + t] = s[t * ranges + r];
          lowest[r * of.size + t] = l[t * ranges + r];
        }
      for (int64_t i = 0; i < each; ++i) {
        const float* weights = scores.data() + i * count + (n - begin) * of.size;
        for (int64_t b = 0; b < bytes; ++b)
          for (int64_t k = 0; k < kEach; ++k) natural[i * of.size + b * kEach + k] = weights[k * bytes + b];
      }
      for (int64_t r = 0; r < ranges; ++r) {
        for (int64_t i = 0; i < each; ++i) {
          const float *weight = natural.data() + i * of.size, *s = scales + r * of.size, *l = lowest + r * of.size;
          float* own = by.data() + i * of.size;
          for (int64_t t = 0; t < of.size; ++t) own[t] = weight[t] * s[t];
          lows[i * ranges + r] += dot(weight, l, of.size);
        }
        columns<bits>(of.value_codes + first * row + r * part_bytes, row, of.size, by.data(), of.size,
                      sums.data() + r * of.channels, of.width, part_bytes, each);
      }
    }
    for (int64_t i = 0; i < each; ++i)
      for (int64_t r = 0; r < ranges; ++r) {
        const float *own = sums.data() + i * of.width + r * of.channels, low = lows[i * ranges + r];
        float* out = part(head, piece, i) + 2 + r * of.channels;
        for (int64_t b = 0; b < part_bytes; ++b)
          for (int64_t k = 0; k < kEach; ++k) out[b * kEach + k] = low + own[k * part_bytes + b];
      }
  }

  // The tokens that are as they came.
  void plain(int64_t head, int64_t piece) const {
    std::vector<float> scores(each * of.recent);
    for (int64_t i = 0; i < each; ++i)
      for (int64_t t = 0; t < of.recent; ++t) {
        const float *q = queries + (head * each + i) * of.width, *k = of.keys + (head * of.recent + t) * of.width;
        scores[i * of.recent + t] = dot(q, k, of.width);
      }
    soften(head, piece, scores.data(), of.recent);
    for (int64_t i = 0; i < each; ++i) {
      float* out = part(head, piece, i) + 2;
      std::fill(out, out + of.width, 0.0f);
      for (int64_t t = 0; t < of.recent; ++t) {
        const float weight = scores[i * of.recent + t], *v = of.values + (head * of.recent + t) * of.width;
        for (int64_t d = 0; d < of.width; ++d) out[d] += weight * v[d];
      }
    }
  }

  void combine(int64_t head, int64_t i, float* out) const {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t p = 0; p < pieces(); ++p) largest = std::max(largest, part(head, p, i)[0]);
    std::fill(out, out + of.width, 0.0f);
    for (int64_t p = 0; p < pieces(); ++p) {
      const float *own = part(head, p, i), weight = exponential(own[0] - largest);
      total += weight * own[1];
      for (int64_t d = 0; d < of.width; ++d) out[d] += weight * own[2 + d];
    }
    for (int64_t d = 0; d < of.width; ++d) out[d] /= total;
  }

  void run(float* out, int64_t threads) const {
    const int64_t all = pieces();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < of.heads * all; ++item) {
        const int64_t head = item / all, piece = item % all;
        if (piece < coded_pieces()) coded(head, piece);
        else plain(head, piece);
      }
#pragma omp for schedule(static)
      for (int64_t item = 0; item < of.heads * each; ++item)
        combine(item / each, item % each, out + item * of.width);
    }
  }
};

}  // namespace

extern "C" {

// Bytes of codes that go together: a group of keys and a range of values have a multiple of them.
int64_t lanes() { return kLeast; }

// Numbers that `parts` has room for.
int64_t parts_floats(const Cache* of, int64_t each) {
  const Attention<8> any{*of, nullptr, each, 0, nullptr};
  return of->heads * any.pieces() * each * (2 + of->width);
}

// queries, out [heads, each, width]
void attend(const Cache* of, const float* queries, int64_t each, float scale, int64_t bits, float* parts,
            float* out, int64_t threads) {
  if (bits == 8) Attention<8>{*of, queries, each, scale, parts}.run(out, threads);
  if (bits == 4) Attention<4>{*of, queries, each, scale, parts}.run(out, threads);
  if (bits == 2) Attention<2>{*of, queries, each, scale, parts}.run(out, threads);
}

}  // extern "C"
