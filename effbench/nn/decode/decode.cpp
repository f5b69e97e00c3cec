// One decoding step of a Llama-style model on a CPU, for a small batch; or a stretch of its blocks, for
// a few positions of each sequence.
//
// Decoding reads every weight once per token, so it is as fast as memory gives the weights. Here the
// whole step is one parallel region: each thread takes piece after piece of the rows of every matrix,
// and what lies between two products (norms, rotary positions, attention, the gated MLP) is done on
// the way. Queries, keys and values are one product over three matrices, gate and up another over two,
// by pointers: no weight is copied. Numbers are rounded to the dtype of the model where the layers of
// transformers round them; sums are in float32.
//
// The instruction set is that of the machine that compiles (see native.py).

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRows = 4;      // rows of a matrix that are read side by side
constexpr int kBatch = 4;     // sequences that share one pass over those rows
constexpr int kAhead = 4096;  // bytes by which rows are fetched before they are used
constexpr int kSpins = 2000;  // looks at what is not done yet before the core is given away
constexpr int64_t kPiece = 65536;  // bytes of weights in one piece of work
constexpr int kPieces = 4;         // pieces that each thread gets, at least, where there are rows
constexpr int kPhases = 6;  // of one decoder block
constexpr int64_t kRank = 1024;  // largest rank of a stand-in
constexpr int64_t kChunk = 256;  // positions of one head that one thread attends to at a time

struct bf16 {
  uint16_t bits;
};

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline bf16 rounded<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
inline float through(float x) {
  return value(rounded<T>(x));
}

// e^x without a branch, so that loops over it are vectorised; within 2 units in the last place.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = std::nearbyint(x * 1.44269504088896341f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline void ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead, 0, 3); }

// -- products ------------------------------------------------------------------------------------

// sums[r * B + b] = <row r, x[b]> for R rows w[r] and B vectors x of K numbers, `stride` apart.
template <typename T, int R, int B>
struct Dot {
  static void run(const T* const* w, const T* x, int64_t stride, int64_t K, float* sums) {
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) {
        const T *row = w[r], *vector = x + b * stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < K; ++k) sum += value(row[k]) * value(vector[k]);
        sums[r * B + b] = sum;
      }
  }
};

#if defined(__AVX512F__) && defined(__AVX512BW__)

inline __m512 widened(const bf16* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int R, int B>
struct Dot<float, R, B> {
  static void run(const float* const* w, const float* x, int64_t stride, int64_t K, float* sums) {
    __m512 acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      __m512 vector[B];
      for (int b = 0; b < B; ++b) vector[b] = _mm512_loadu_ps(x + b * stride + k);
      for (int r = 0; r < R; ++r) {
        ahead(w[r] + k);
        __m512 row = _mm512_loadu_ps(w[r] + k);
        for (int b = 0; b < B; ++b) acc[r][b] = _mm512_fmadd_ps(row, vector[b], acc[r][b]);
      }
    }
    if (k < K) {
      __mmask16 rest = __mmask16((1u << (K - k)) - 1);
      for (int r = 0; r < R; ++r) {
        __m512 row = _mm512_maskz_loadu_ps(rest, w[r] + k);
        for (int b = 0; b < B; ++b)
          acc[r][b] = _mm512_fmadd_ps(
              row, _mm512_maskz_loadu_ps(rest, x + b * stride + k), acc[r][b]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) sums[r * B + b] = _mm512_reduce_add_ps(acc[r][b]);
  }
};

template <int R, int B>
struct Dot<bf16, R, B> {
  static void run(const bf16* const* w, const bf16* x, int64_t stride, int64_t K, float* sums) {
    __m512 acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) add<false>(w, x, stride, k, 0, acc);
    if (k < K) add<true>(w, x, stride, k, __mmask32((uint64_t(1) << (K - k)) - 1), acc);
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) sums[r * B + b] = _mm512_reduce_add_ps(acc[r][b]);
  }

  template <bool kMasked>
  static __m512i load(const bf16* p, __mmask32 mask) {
    return kMasked ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
  }

  template <bool kMasked>
  static void add(const bf16* const* w, const bf16* x, int64_t stride, int64_t k, __mmask32 mask,
                  __m512 (*acc)[B]) {
    __m512i vector[B];
    for (int b = 0; b < B; ++b) vector[b] = load<kMasked>(x + b * stride + k, mask);
    for (int r = 0; r < R; ++r) {
      ahead(w[r] + k);
      __m512i row = load<kMasked>(w[r] + k, mask);
      for (int b = 0; b < B; ++b) acc[r][b] = multiplied(row, vector[b], acc[r][b]);
    }
  }

  // Adds the products of 32 pairs to 16 sums: even and odd places share one.
  static __m512 multiplied(__m512i a, __m512i b, __m512 sum) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
    __m512 low = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                 _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, odd)), low);
#endif
  }
};

#endif

template <typename T, int R>
void dots(const T* const* w, const T* x, int64_t stride, int64_t K, int batch, float* sums) {
  int b = 0;  // sums is [batch, R]
  float part[R * kBatch];
  for (; b + kBatch <= batch; b += kBatch) {
    Dot<T, R, kBatch>::run(w, x + b * stride, stride, K, part);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kBatch; ++j) sums[(b + j) * R + r] = part[r * kBatch + j];
  }
  for (; b < batch; ++b) Dot<T, R, 1>::run(w, x + b * stride, stride, K, sums + b * R);
}

// -- threads -------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
};

// A part of a step whose pieces any thread may do, in any order. It is over when all pieces are
// done; a thread that comes late (because something else has its core) finds none left and goes on.
struct alignas(64) Phase {
  std::atomic<int64_t> next{0}, done{0};

  template <typename Work>
  void run(int64_t n, int64_t grain, Work work) {
    const int64_t pieces = (n + grain - 1) / grain;
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
      int64_t begin = piece * grain;
      work(Range{begin, begin + grain < n ? begin + grain : n});
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < pieces; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins > kSpins) std::this_thread::yield();
    }
  }
};

// Units of `bytes` each that make one piece: a multiple of `align`, several pieces to a thread.
int64_t grain(int64_t n, int64_t bytes, int64_t align, int64_t threads) {
  int64_t units = kPiece / bytes, most = n / (kPieces * threads);
  if (units > most) units = most;
  return (units / align + 1) * align;
}

}  // namespace

// -- what Python hands over (native.py has the same fields) -----------------------------------------

extern "C" {

struct Layer {
  const void *q, *k, *v, *o, *gate, *up, *down;
  const void *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
  const void *attention_norm, *mlp_norm;
  void *keys, *values;  // [batch, kv_heads, capacity, head_dim]
  int64_t heads, kv_heads, inner;  // 0: no attention, or no MLP
  int64_t capacity;
  // What stands in for the block where a step leaves it out: start + scale b (a h), h being what the
  // block would read, and start the anchor or, where there is none, h itself.
  const float *a, *b;  // [rank, hidden], [hidden, rank]
  void* anchor;        // [batch, hidden]: what the block gave when it last ran
  int64_t rank;        // 0: start alone
  int64_t running;     // whether the anchor follows the stand-in too
  float scale;
};

struct Model {
  int64_t hidden, inner, heads, head_dim, vocab, layers;  // inner, heads: the most of any layer
  float eps, scale;
  const void *embedding, *norm, *head, *head_bias;
  const void *cos, *sin;  // [positions, head_dim]
  const Layer* layer;
};

struct Step {
  int64_t batch;                               // rows: `width` following positions of each sequence
  const int64_t *tokens, *positions, *starts;  // [batch]; starts: padding on the left
  const int64_t* lengths;  // [layers]: positions in each cache before this step
  const uint8_t* runs;     // [layers]: 0 leaves a block out
  void* logits;            // [batch, vocab]; null: none are wanted
  float* scratch;          // scratch_floats()
  int64_t threads;
  int64_t width;        // positions of each sequence; with stand-ins, 1
  int64_t first, last;  // the blocks from first to last - 1
  const void* inputs;   // [batch, hidden]: what they read; null: the embeddings of the tokens
  void* outputs;        // [batch, hidden]: what the last one gave; null: not wanted
};

// For `batch` rows that attend to at most `capacity` positions.
int64_t scratch_floats(const Model* m, int64_t batch, int64_t capacity) {
  int64_t chunks = capacity / kChunk + 2;
  int64_t q = m->heads * m->head_dim;
  return batch * (5 * m->hidden + 4 * q + 2 * m->inner + m->heads * chunks * (m->head_dim + 2)) +
         256;
}
}

namespace {

template <typename T>
struct Work {
  const Model& m;
  const Step& s;
  T *hidden, *query, *mixed, *act;
  float* wide;     // hidden, for stand-ins
  float* partial;  // per head and chunk: largest score, sum of weights, weighted values
  std::vector<Phase> phases;

  Work(const Model& model, const Step& step)
      : m(model), s(step), phases(size_t(model.layers * kPhases + 3)) {
    const int64_t q_width = m.heads * m.head_dim;
    float* place = s.scratch;
    auto take = [&](int64_t n) {
      T* p = reinterpret_cast<T*>(place);
      place += (n * int64_t(sizeof(T)) + 63) / 64 * 16;
      return p;
    };
    hidden = take(s.batch * m.hidden);
    query = take(s.batch * q_width);
    mixed = take(s.batch * q_width);
    act = take(s.batch * m.inner);
    wide = place;
    partial = place + s.batch * m.hidden;
  }

  static const T* at(const void* p, int64_t offset = 0) { return static_cast<const T*>(p) + offset; }
  static float bias(const void* p, int64_t i) { return p ? value(at(p)[i]) : 0.0f; }

  // Writes RMS-normed hidden states to `out` [batch, hidden]; every thread has its own.
  void normed(const void* weight, T* out) const {
    const T* w = at(weight);
    for (int64_t b = 0; b < s.batch; ++b) {
      const T* x = hidden + b * m.hidden;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < m.hidden; ++i) sum += value(x[i]) * value(x[i]);
      float scale = 1.0f / std::sqrt(sum / float(m.hidden) + m.eps);
      for (int64_t i = 0; i < m.hidden; ++i)
        out[b * m.hidden + i] = rounded<T>(value(w[i]) * through<T>(value(x[i]) * scale));
    }
  }

  // Two rows of queries or keys that turn into each other, or two rows of values.
  void projected(const Layer& l, int64_t length, int64_t unit, const T* x) const {
    int64_t half = m.head_dim / 2, head = unit / half, i = unit % half;
    int64_t place = head * m.head_dim;
    const int64_t q_width = l.heads * m.head_dim, kv_width = l.kv_heads * m.head_dim;
    bool is_q = head < l.heads, is_k = !is_q && head < l.heads + l.kv_heads;
    int64_t first = is_q ? place : place - q_width - (is_k ? 0 : kv_width);
    const void* matrix = is_q ? l.q : is_k ? l.k : l.v;
    const void* shift = is_q ? l.q_bias : is_k ? l.k_bias : l.v_bias;
    int64_t low = first + i, high = low + half;
    const T* rows[2] = {at(matrix, low * m.hidden), at(matrix, high * m.hidden)};
    float sums[2 * 64];
    dots<T, 2>(rows, x, m.hidden, m.hidden, int(s.batch), sums);
    for (int64_t b = 0; b < s.batch; ++b) {
      float a = through<T>(sums[b * 2] + bias(shift, low));
      float c = through<T>(sums[b * 2 + 1] + bias(shift, high));
      if (is_q || is_k) {
        const T* cos = at(m.cos, s.positions[b] * m.head_dim);
        const T* sin = at(m.sin, s.positions[b] * m.head_dim);
        float turned = through<T>(a * value(cos[i])) + through<T>(-c * value(sin[i]));
        c = through<T>(c * value(cos[i + half])) + through<T>(a * value(sin[i + half]));
        a = turned;
      }
      T* out = query + b * q_width + low - i;
      if (!is_q)
        out = cached(l, is_k ? l.keys : l.values, b / s.width, first / m.head_dim,
                     length + b % s.width);
      out[i] = rounded<T>(a);
      out[i + half] = rounded<T>(c);
    }
  }

  T* cached(const Layer& l, void* cache, int64_t sequence, int64_t head, int64_t position) const {
    return static_cast<T*>(cache) +
           ((sequence * l.kv_heads + head) * l.capacity + position) * m.head_dim;
  }

  // One head of one row over one chunk of the positions up to its own.
  void attended(const Layer& l, int64_t length, int64_t chunks, int64_t item) const {
    int64_t chunk = item % chunks, head = item / chunks % l.heads, b = item / chunks / l.heads;
    int64_t D = m.head_dim, kv = head / (l.heads / l.kv_heads);
    int64_t begin = chunk * kChunk, end = begin + kChunk;
    if (begin < s.starts[b]) begin = s.starts[b];
    if (end > length + b % s.width + 1) end = length + b % s.width + 1;
    float* out = partial + item * (D + 2);
    float *sums = out + 2, scores[kChunk], largest = -INFINITY, total = 0;
    for (int64_t d = 0; d < D; ++d) sums[d] = 0;
    const T* q = query + (b * l.heads + head) * D;
    const T* keys = cached(l, l.keys, b / s.width, kv, 0);
    for (int64_t t = begin; t < end; t += kRows) {
      int64_t many = end - t < kRows ? end - t : kRows;
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = keys + (t + (r < many ? r : 0)) * D;
      float found[kRows];
      Dot<T, kRows, 1>::run(rows, q, 0, D, found);
      for (int64_t r = 0; r < many; ++r) {
        scores[t - begin + r] = found[r] * m.scale;
        largest = scores[t - begin + r] > largest ? scores[t - begin + r] : largest;
      }
    }
    int64_t count = end > begin ? end - begin : 0;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < count; ++t) {
      scores[t] = exponential(scores[t] - largest);
      total += scores[t];
    }
    const T* values = cached(l, l.values, b / s.width, kv, begin);
    for (int64_t t = 0; t < count; ++t) {
      const T* row = values + t * D;
      float weight = scores[t];
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sums[d] += weight * value(row[d]);
    }
    out[0] = largest;
    out[1] = total;
    if (chunks == 1) combined(chunks, item);
  }

  // The chunks of one head of one row, put together.
  void combined(int64_t chunks, int64_t item) const {
    int64_t D = m.head_dim;
    const float* parts = partial + item * chunks * (D + 2);
    float largest = -INFINITY, total = 0;
    for (int64_t c = 0; c < chunks; ++c)
      if (parts[c * (D + 2)] > largest) largest = parts[c * (D + 2)];
    float sums[1024] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const float* part = parts + c * (D + 2);
      float weight = part[1] > 0 ? exponential(part[0] - largest) : 0.0f;
      total += weight * part[1];
      for (int64_t d = 0; d < D; ++d) sums[d] += weight * part[2 + d];
    }
    for (int64_t d = 0; d < D; ++d) mixed[item * D + d] = rounded<T>(sums[d] / total);
  }

  // hidden += x W^T for the rows of one thread; `copy`, if any, takes the same rows.
  void added(const void* matrix, const void* shift, const T* x, int64_t K, void* copy,
             Range r) const {
    rows(matrix, x, K, r, [&](int64_t b, int64_t row, float sum) {
      T& place = hidden[b * m.hidden + row];
      place = rounded<T>(value(place) + through<T>(sum + bias(shift, row)));
      if (copy) static_cast<T*>(copy)[b * m.hidden + row] = place;
    });
  }

  // use(i, <row i of w, x>) for N rows of K numbers.
  template <typename Use>
  static void mapped(const float* w, const float* x, int64_t K, int64_t N, Use use) {
    for (int64_t begin = 0; begin < N; begin += kRows) {
      int64_t many = N - begin < kRows ? N - begin : kRows;
      const float* rows[kRows];
      for (int j = 0; j < kRows; ++j) rows[j] = w + (begin + (j < many ? j : 0)) * K;
      float sums[kRows];
      Dot<float, kRows, 1>::run(rows, x, 0, K, sums);
      for (int j = 0; j < many; ++j) use(begin + j, sums[j]);
    }
  }

  // One sequence through the stand-ins of the blocks from `begin` to `end`.
  void stood_in(int64_t begin, int64_t end, int64_t sequence) const {
    T* h = hidden + sequence * m.hidden;
    float* x = wide + sequence * m.hidden;
    for (int64_t index = begin; index < end; ++index) {
      const Layer& l = m.layer[index];
      T* anchor = l.anchor ? static_cast<T*>(l.anchor) + sequence * m.hidden : nullptr;
      const T* start = anchor ? anchor : h;
      float inner[kRank];
      for (int64_t i = 0; i < m.hidden && l.rank; ++i) x[i] = value(h[i]);
      mapped(l.a, x, m.hidden, l.rank, [&](int64_t r, float sum) { inner[r] = sum; });
      mapped(l.b, inner, l.rank, m.hidden, [&](int64_t i, float sum) {
        h[i] = rounded<T>(value(start[i]) + l.scale * sum);
      });
      if (l.running && anchor) std::memcpy(anchor, h, m.hidden * sizeof(T));
    }
  }

  template <typename Use>
  void rows(const void* matrix, const T* x, int64_t K, Range r, Use use) const {
    float sums[kRows * 64];
    int64_t row = r.begin;
    for (; row + kRows <= r.end; row += kRows) {
      const T* w[kRows];
      for (int j = 0; j < kRows; ++j) w[j] = at(matrix, (row + j) * K);
      dots<T, kRows>(w, x, K, K, int(s.batch), sums);
      for (int64_t b = 0; b < s.batch; ++b)
        for (int j = 0; j < kRows; ++j) use(b, row + j, sums[b * kRows + j]);
    }
    for (; row < r.end; ++row) {
      const T* w[1] = {at(matrix, row * K)};
      dots<T, 1>(w, x, K, K, int(s.batch), sums);
      for (int64_t b = 0; b < s.batch; ++b) use(b, row, sums[b]);
    }
  }

  // act = silu(x gate^T) * x up^T for the rows of one thread.
  void gated(const Layer& l, const T* x, Range r) const {
    float sums[4 * 64];
    for (int64_t row = r.begin; row < r.end; row += 2) {
      int64_t next = row + 1 < r.end ? row + 1 : row;
      const T* w[4] = {at(l.gate, row * m.hidden), at(l.gate, next * m.hidden),
                       at(l.up, row * m.hidden), at(l.up, next * m.hidden)};
      dots<T, 4>(w, x, m.hidden, m.hidden, int(s.batch), sums);
      for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t i = row; i <= next; ++i) {
          float gate = through<T>(sums[b * 4 + i - row] + bias(l.gate_bias, i));
          float up = through<T>(sums[b * 4 + 2 + i - row] + bias(l.up_bias, i));
          act[b * l.inner + i] = rounded<T>(through<T>(silu(gate)) * up);
        }
    }
  }

  // The attention of one block, as one of several threads; `phase` moves on by what was run.
  template <typename Pieces>
  void attention(const Layer& l, int64_t length, Phase*& phase, T* own, const Pieces& pieces) {
    const int64_t q_width = l.heads * m.head_dim, items = s.batch * l.heads;
    const int64_t chunks = (length + s.width + kChunk - 1) / kChunk;
    // A layer may lack the first or the last of q, k and v, and take another's.
    const int64_t kv_width = l.kv_heads * m.head_dim, first = l.q ? 0 : (q_width + kv_width) / 2;
    const int64_t units = q_width / 2 + (l.v ? kv_width : 0) - first;
    bool ready = false;
    (phase++)->run(units, pieces(units, 2 * m.hidden, 1), [&](Range r) {
      if (!ready) normed(l.attention_norm, own);
      ready = true;
      for (int64_t unit = r.begin; unit < r.end; ++unit)
        projected(l, length, first + unit, own);
    });
    (phase++)->run(items * chunks, 1, [&](Range r) { attended(l, length, chunks, r.begin); });
    (phase++)->run(chunks > 1 ? items : 0, 1, [&](Range r) { combined(chunks, r.begin); });
    void* copy = l.inner ? nullptr : l.anchor;
    (phase++)->run(m.hidden, pieces(m.hidden, q_width, kRows),
                   [&](Range r) { added(l.o, l.o_bias, mixed, q_width, copy, r); });
  }

  // The MLP of one block, likewise.
  template <typename Pieces>
  void mlp(const Layer& l, Phase*& phase, T* own, const Pieces& pieces) {
    bool ready = false;
    (phase++)->run(l.inner, pieces(l.inner, 2 * m.hidden, 2), [&](Range r) {
      if (!ready) normed(l.mlp_norm, own);
      ready = true;
      gated(l, own, r);
    });
    (phase++)->run(m.hidden, pieces(m.hidden, l.inner, kRows),
                   [&](Range r) { added(l.down, l.down_bias, act, l.inner, l.anchor, r); });
  }

  // Everything, as one of several threads; `own` is room for the normed inputs.
  void run(int threads, T* own) {
    Phase* phase = phases.data();
    auto pieces = [&](int64_t n, int64_t width, int64_t align) {
      return grain(n, width * int64_t(sizeof(T)), align, threads);
    };
    (phase++)->run(s.batch, 1, [&](Range r) {
      for (int64_t b = r.begin; b < r.end; ++b) {
        const T* from = s.inputs ? at(s.inputs, b * m.hidden)
                                 : at(m.embedding, s.tokens[b] * m.hidden);
        std::memcpy(hidden + b * m.hidden, from, m.hidden * sizeof(T));
      }
    });
    for (int64_t index = s.first; index < s.last; ++index) {
      const Layer& l = m.layer[index];
      if (!s.runs[index]) {  // with those after it that are left out too
        int64_t end = index + 1;
        while (end < s.last && !s.runs[end]) ++end;
        (phase++)->run(s.batch, 1, [&](Range r) { stood_in(index, end, r.begin); });
        index = end - 1;
        continue;
      }
      if (l.heads) attention(l, s.lengths[index], phase, own, pieces);
      if (l.inner) mlp(l, phase, own, pieces);
    }
    (phase++)->run(s.outputs ? s.batch : 0, 1, [&](Range r) {
      std::memcpy(static_cast<T*>(s.outputs) + r.begin * m.hidden, hidden + r.begin * m.hidden,
                  m.hidden * sizeof(T));
    });
    bool ready = false;
    phase->run(s.logits ? m.vocab : 0, pieces(m.vocab, m.hidden, kRows), [&](Range r) {
      if (!ready) normed(m.norm, own);
      ready = true;
      rows(m.head, own, m.hidden, r, [&](int64_t b, int64_t row, float sum) {
        static_cast<T*>(s.logits)[b * m.vocab + row] = rounded<T>(sum + bias(m.head_bias, row));
      });
    });
  }
};

template <typename T>
void decode(const Model* m, const Step* s) {
  Work<T> work(*m, *s);
#pragma omp parallel num_threads(int(s->threads))
  {
    std::vector<T> own(size_t(s->batch * m->hidden));
    work.run(omp_get_num_threads(), own.data());
  }
}

template <typename T>
void product(const void* w, const void* x, void* y, int64_t N, int64_t K, int64_t threads) {
  Phase phase;
  const int64_t piece = grain(N, K * int64_t(sizeof(T)), kRows, threads);
#pragma omp parallel num_threads(int(threads))
  phase.run(N, piece, [&](Range r) {
    float sums[kRows];
    for (int64_t row = r.begin; row < r.end; row += kRows) {
      int64_t many = r.end - row < kRows ? r.end - row : kRows;
      const T* rows[kRows];
      for (int j = 0; j < kRows; ++j)
        rows[j] = static_cast<const T*>(w) + (row + (j < many ? j : 0)) * K;
      Dot<T, kRows, 1>::run(rows, static_cast<const T*>(x), 0, K, sums);
      for (int j = 0; j < many; ++j) static_cast<T*>(y)[row + j] = rounded<T>(sums[j]);
    }
  });
}

}  // namespace

extern "C" {
void decode_bf16(const Model* m, const Step* s) { decode<bf16>(m, s); }
void decode_f32(const Model* m, const Step* s) { decode<float>(m, s); }
void gemv_bf16(const void* w, const void* x, void* y, int64_t N, int64_t K, int64_t threads) {
  product<bf16>(w, x, y, N, K, threads);
}
void gemv_f32(const void* w, const void* x, void* y, int64_t N, int64_t K, int64_t threads) {
  product<float>(w, x, y, N, K, threads);
}
}
