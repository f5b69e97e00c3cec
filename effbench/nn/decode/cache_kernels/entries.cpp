// Entries of a cache made ready to be attended to, in one pass over them each (entries.py says of what).
//
// Every number is what torch's own operations give, each rounded by itself, so the library must be compiled
// without contraction to fused multiply-adds.

#include <cstdint>
#include <vector>

namespace {

// Where the groups of all heads are, and where their tokens go: token t of group n of a head in row
// n size + t of its `rows`.
struct Groups {
  const uint8_t* codes;
  const float *scales, *lows;
  int64_t heads, groups, size, width;
  float* out;
  int64_t rows;

  float* place(int64_t i) const { return out + ((i / groups) * rows + (i % groups) * size) * width; }
};

// Codes of 8, 4 or 2 bits fill whole bytes, the lowest bits first.
template <int bits>
uint8_t code(uint8_t byte, int which) {
  return static_cast<uint8_t>((byte >> (which * bits)) & ((1 << bits) - 1));
}

template <int bits>
void keys(const Groups& of, int64_t threads) {
  constexpr int each = 8 / bits;
  const int64_t across = of.size / each, width = of.width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> turned(across * width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < of.heads * of.groups; ++i) {
      const uint8_t* own = of.codes + i * across * width;
      const float *scale = of.scales + i * width, *low = of.lows + i * width;
      float* row = of.place(i);
      for (int64_t d = 0; d < width; ++d)
        for (int64_t b = 0; b < across; ++b) turned[b * width + d] = own[d * across + b];
      for (int64_t b = 0; b < across; ++b)
        for (int k = 0; k < each; ++k, row += width) {
          const uint8_t* byte = turned.data() + b * width;
          for (int64_t d = 0; d < width; ++d)
            row[d] = static_cast<float>(code<bits>(byte[d], k)) * scale[d] + low[d];
        }
    }
  }
}

template <int bits>
void values(const Groups& of, int64_t channels, int64_t threads) {
  constexpr int each = 8 / bits;
  const int64_t count = of.size * of.width, parts = count / channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> single(count);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < of.heads * of.groups; ++i) {
      const uint8_t* own = of.codes + i * (count / each);
      for (int64_t b = 0; b < count / each; ++b)
        for (int k = 0; k < each; ++k) single[b * each + k] = code<bits>(own[b], k);
      const uint8_t* from = single.data();
      float* to = of.place(i);
      for (int64_t part = 0; part < parts; ++part, from += channels, to += channels) {
        const float scale = of.scales[i * parts + part], low = of.lows[i * parts + part];
        for (int64_t d = 0; d < channels; ++d) to[d] = static_cast<float>(from[d]) * scale + low;
      }
    }
  }
}

}  // namespace

extern "C" {

// Groups of keys, a range for each channel over the tokens of a group.
//
//   codes [heads, groups, width, size], scales and lows [heads, groups, width], out [heads, rows, width];
//   the codes of a channel fill whole bytes
void expand_keys(const uint8_t* codes, const float* scales, const float* lows, int64_t heads,
                 int64_t groups, int64_t size, int64_t width, int64_t bits, float* out, int64_t rows,
                 int64_t threads) {
  const Groups of{codes, scales, lows, heads, groups, size, width, out, rows};
  if (bits == 8) keys<8>(of, threads);
  if (bits == 4) keys<4>(of, threads);
  if (bits == 2) keys<2>(of, threads);
}

// Groups of values, ranges for each token over `channels` channels each.
//
//   codes [heads, groups, size, width], scales and lows [heads, groups, size, width / channels]
void expand_values(const uint8_t* codes, const float* scales, const float* lows, int64_t heads,
                   int64_t groups, int64_t size, int64_t width, int64_t channels, int64_t bits, float* out,
                   int64_t rows, int64_t threads) {
  const Groups of{codes, scales, lows, heads, groups, size, width, out, rows};
  if (bits == 8) values<8>(of, channels, threads);
  if (bits == 4) values<4>(of, channels, threads);
  if (bits == 2) values<2>(of, channels, threads);
}

// Vectors turned at their places as Llama turns them: x cos + (-x2, x1) sin.
//
//   x, out [rows, heads, tokens, width] with strides of their own, the last of them 1
//   cos, sin [places, width]; places [rows, tokens], or [1, tokens] where `shared`
void turn(const float* x, const int64_t* strides, const int64_t* sizes, const float* cos, const float* sin,
          const int64_t* places, int64_t shared, float* out, const int64_t* to_strides, int64_t threads) {
  const int64_t heads = sizes[1], tokens = sizes[2], width = sizes[3], half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < sizes[0] * tokens; ++i) {
    const int64_t b = i / tokens, t = i % tokens;
    const int64_t place = places[(shared ? 0 : b) * tokens + t];
    const float *c = cos + place * width, *s = sin + place * width;
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = x + b * strides[0] + h * strides[1] + t * strides[2];
      float* to = out + b * to_strides[0] + h * to_strides[1] + t * to_strides[2];
      for (int64_t d = 0; d < half; ++d) to[d] = from[d] * c[d] + -from[d + half] * s[d];
      for (int64_t d = half; d < width; ++d) to[d] = from[d] * c[d] + from[d - half] * s[d];
    }
  }
}

}  // extern "C"
