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

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include <omp.h>

#include "numbers.h"
#include "packed.h"
#include "phases.h"
#include "planes.h"
#include "products.h"

namespace {

constexpr int kPhases = 6;       // of one decoder block
constexpr int kRows = 64;        // rows of a matrix that are read before those of another, at the most
constexpr int kMostRows = 64;    // sequences times positions of one step
constexpr int kHeld = 1024;      // products that are held before they are used
constexpr int kHeads = 4;        // query heads that share one pass over values
constexpr int64_t kRank = 1024;  // largest rank of a stand-in
constexpr int64_t kChunk = 128;  // positions of one head that one thread attends to at a time

}  // namespace

// -- what Python hands over (native.py has the same fields) -----------------------------------------

extern "C" {

struct Layer {
  Matrix q, k, v, o, gate, up, down;
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
  const void *embedding, *norm;
  Matrix table, head;  // table: codes of the embedding, where `embedding` is null
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
  // Blocks whose attention somebody else's is: the first one goes on after it, with what it mixed, and the
  // block after the last gives what it will be asked with. Either may be null.
  const void* mixed;             // [batch, heads head_dim]
  void *queries, *keys, *values;  // [batch, heads, head_dim], and of key heads
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

// Rows of a matrix that are read before those of another: the more, the longer memory is one stream.
inline int64_t rows_of(int64_t batch) { return batch * kRows < kHeld ? kRows : kHeld / batch; }

// As many as `most` rows at a time, all times alike.
inline int64_t even(int64_t n, int64_t most) {
  const int64_t times = (n + most - 1) / most;
  return times ? (n + times - 1) / times : 1;
}

// The inputs of some products, in the forms in which their matrices take them; a thread's own.
template <typename T>
struct Inputs {
  using X = typename Operand<T>::type;

  Inputs(int64_t rows, int64_t widest) : dense(size_t(rows * widest)), batch(rows) {}

  // Takes x, [batch, K], for products with these matrices.
  void take(const T* x, int64_t K, std::initializer_list<const Matrix*> matrices) {
    columns_ = K;
    bool made[kForms + 1] = {};
    for (const Matrix* m : matrices) {
      const int form = m->bits ? form_of(m->bits) : kForms;
      if (!m->weight || made[form]) continue;
      made[form] = true;
      if (m->bits)
        pack(x, K, m->bits, form);
      else
        as_operand(x, dense.data(), K * batch);
    }
  }

  // sums[i][b] = <row + i, x[b]> for `count` rows.
  void dots(const Matrix& m, int64_t row, int64_t count, float* sums) const {
    const Packable* packed = m.bits ? forms_[form_of(m.bits)].vectors.data() : nullptr;
    if (in_planes(m.bits))
      plane_dots<T>(m, row, count, columns_, packed, int(batch), sums);
    else if (m.bits)
      packed_dots(m, row, count, columns_, packed, int(batch), sums);
    else
      ::dots<T>(static_cast<const T*>(m.weight) + row * columns_, count, dense.data(), columns_,
                columns_, int(batch), sums);
  }

  Array<X> dense;
  const int64_t batch;

 private:
  static constexpr int kForms = 6;
  static int form_of(int64_t bits) {
    if (in_windows(bits)) return 4;
    if (as_they_are<T>(bits)) return 5;
    return in_planes(bits) ? 3 : bits == kNF4 ? 2 : bits == 8;
  }

  struct Form {
    Array<int16_t> ints;
    Array<float> factors;
    std::vector<Packable> vectors;
  };

  void pack(const T* x, int64_t K, int64_t bits, int form) {
    const int64_t width = padded(K), blocks = (K / kBlock + 7) / 8 * 8;
    Form& f = forms_[form];
    f.ints.resize(size_t(batch * width));
    f.factors.assign(size_t(2 * batch * blocks), 0.0f);
    f.vectors.resize(size_t(batch));
    wide_.resize(size_t(K));
    for (int64_t b = 0; b < batch; ++b) {
      float* own = f.factors.data() + 2 * b * blocks;
      f.vectors[size_t(b)] = {f.ints.data() + b * width, own, own + blocks};
      if constexpr (std::is_same_v<T, bf16>)
        if (as_they_are<T>(bits)) {
          in_order(x + b * K, K, f.vectors[size_t(b)].ints);
          continue;
        }
      for (int64_t i = 0; i < K; ++i) wide_[size_t(i)] = value(x[b * K + i]);
      packable(wide_.data(), K, bits, f.vectors[size_t(b)]);
    }
  }

  int64_t columns_ = 0;
  Array<float> wide_;
  Form forms_[kForms];
};

template <typename T>
struct Work {
  const Model& m;
  const Step& s;
  T *hidden, *query, *mixed, *act;
  float* wide;     // hidden, for stand-ins
  float* partial;  // per head and chunk: largest score, sum of weights, weighted values
  Phases phases;

  using X = typename Operand<T>::type;
  using Walk = Phases::Walk;

  Work(const Model& model, const Step& step)
      : m(model), s(step), phases(model.layers * kPhases + 3, step.threads) {
    const int64_t q_width = m.heads * m.head_dim;
    float* place = s.scratch;
    auto take = [&](int64_t n) {
      T* p = reinterpret_cast<T*>(place);
      place += (n * int64_t(sizeof(T)) + 63) / 64 * 16;
      return p;
    };
    hidden = take(s.batch * m.hidden);
    query = s.queries ? static_cast<T*>(s.queries) : take(s.batch * q_width);
    mixed = take(s.batch * q_width);
    act = take(s.batch * m.inner);
    wide = place;
    partial = place + s.batch * m.hidden;
  }

  static const T* at(const void* p, int64_t offset = 0) { return static_cast<const T*>(p) + offset; }
  static float bias(const Matrix& matrix, int64_t row) {
    return matrix.bias ? value(at(matrix.bias)[row]) : 0.0f;
  }
  // Bytes of a row, of about K numbers.
  static int64_t row_bytes(const Matrix& matrix, int64_t K) {
    const int64_t own = matrix.bits == kNF4 ? 4 : matrix.bits;
    const int64_t bits = in_planes(matrix.bits) ? matrix.planes : own;
    return matrix.bits ? K * (bits + 1) / 8 + 1 : K * int64_t(sizeof(T));
  }

  // RMS-normed hidden states, [batch, hidden].
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

  // -- attention -----------------------------------------------------------------------------------

  // Heads of queries, keys and values in a row; a layer may lack the first or the last of them, and
  // take another's.
  struct Heads {
    int64_t first, end, blocks;  // blocks of pairs of rows in each
  };

  Heads heads_of(const Layer& l) const {
    return {l.q.weight ? 0 : l.heads + l.kv_heads,
            l.heads + (l.v.weight ? 2 * l.kv_heads : 0),
            (m.head_dim / 2 + rows_of(s.batch) - 1) / rows_of(s.batch)};
  }

  // Some rows of one head and those that they turn into each other with.
  void projected(const Layer& l, int64_t length, int64_t unit, const Heads& heads,
                 const Inputs<T>& x) const {
    const int64_t half = m.head_dim / 2, head = heads.first + unit / heads.blocks;
    const int64_t most = rows_of(s.batch), begin = unit % heads.blocks * most;
    const int64_t count = half - begin < most ? half - begin : most;
    const bool is_q = head < l.heads, is_k = !is_q && head < l.heads + l.kv_heads;
    const Matrix& matrix = is_q ? l.q : is_k ? l.k : l.v;
    const int64_t own = is_q ? head : (head - l.heads) % l.kv_heads, low = own * m.head_dim + begin;
    float sums[2][kHeld];
    for (int part = 0; part < 2; ++part) x.dots(matrix, low + part * half, count, sums[part]);
    for (int64_t b = 0; b < s.batch; ++b) {
      T* out = is_q ? query + (b * l.heads + own) * m.head_dim
                    : cached(l, is_k ? l.keys : l.values, b / s.width, own, length + b % s.width);
      const T* cos = at(m.cos, s.positions[b] * m.head_dim);
      const T* sin = at(m.sin, s.positions[b] * m.head_dim);
      for (int64_t i = 0; i < count; ++i) {
        float a = through<T>(sums[0][i * s.batch + b] + bias(matrix, low + i));
        float c = through<T>(sums[1][i * s.batch + b] + bias(matrix, low + half + i));
        const int64_t d = begin + i, e = d + half;
        if (is_q || is_k) {
          float turned = through<T>(a * value(cos[d])) + through<T>(-c * value(sin[d]));
          c = through<T>(c * value(cos[e])) + through<T>(a * value(sin[e]));
          a = turned;
        }
        out[d] = rounded<T>(a);
        out[e] = rounded<T>(c);
      }
    }
  }

  T* cached(const Layer& l, void* cache, int64_t sequence, int64_t head, int64_t position) const {
    return static_cast<T*>(cache) +
           ((sequence * l.kv_heads + head) * l.capacity + position) * m.head_dim;
  }

  // Up to kHeads heads of one row, which share keys and values, over one chunk of the positions up
  // to its own.
  template <int G>
  void attended(const Layer& l, int64_t b, int64_t head, int64_t chunk, int64_t chunks,
                int64_t length, X* queries) const {
    const int64_t D = m.head_dim, kv = head / (l.heads / l.kv_heads);
    int64_t begin = chunk * kChunk, end = begin + kChunk;
    if (begin < s.starts[b]) begin = s.starts[b];
    if (end > length + b % s.width + 1) end = length + b % s.width + 1;
    const int64_t count = end > begin ? end - begin : 0;
    float scores[G][kChunk + 4];
    float* outs[G];
    const float* weights[G];
    as_operand(query + (b * l.heads + head) * D, queries, G * D);
    const T* keys = cached(l, l.keys, b / s.width, kv, begin);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4)
      for (int g = 0; g < G; ++g) four(keys + t * D, queries + g * D, D, scores[g] + t);
    for (; t < count; ++t)
      for (int g = 0; g < G; ++g)
        Dot<T, 1>::run(keys + t * D, queries + g * D, 0, D, scores[g] + t);
    for (int g = 0; g < G; ++g) {
      float largest = -INFINITY, total = 0;
      for (int64_t i = 0; i < count; ++i) {
        scores[g][i] *= m.scale;
        largest = scores[g][i] > largest ? scores[g][i] : largest;
      }
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < count; ++i) {
        scores[g][i] = exponential(scores[g][i] - largest);
        total += scores[g][i];
      }
      float* out = partial + ((b * l.heads + head + g) * chunks + chunk) * (D + 2);
      out[0] = largest;
      out[1] = total;
      outs[g] = out + 2;
      weights[g] = scores[g];
    }
    weighed<T, G>(weights, cached(l, l.values, b / s.width, kv, begin), count, D, outs);
    for (int g = 0; g < G && chunks == 1; ++g) combined(1, b * l.heads + head + g);
  }

  // All heads of one key head, likewise.
  void attended(const Layer& l, int64_t length, int64_t chunks, int64_t item, X* queries) const {
    const int64_t chunk = item % chunks, kv = item / chunks % l.kv_heads;
    const int64_t b = item / chunks / l.kv_heads, group = l.heads / l.kv_heads;
    for (int64_t g = 0, head = kv * group; g < group;) {
      const int64_t left = group - g;
      if (left >= kHeads) attended<kHeads>(l, b, head + g, chunk, chunks, length, queries);
      else if (left == 3) attended<3>(l, b, head + g, chunk, chunks, length, queries);
      else if (left == 2) attended<2>(l, b, head + g, chunk, chunks, length, queries);
      else attended<1>(l, b, head + g, chunk, chunks, length, queries);
      g += left < kHeads ? left : kHeads;
    }
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

  // -- the other products ------------------------------------------------------------------------------

  // Hands over each of some rows and its products with all vectors.
  template <typename Use>
  static void by_rows(const Matrix& matrix, const Inputs<T>& x, Range r, Use use) {
    float sums[kHeld];
    const int64_t most = even(r.end - r.begin, rows_of(x.batch));
    for (int64_t begin = r.begin; begin < r.end; begin += most) {
      const int64_t count = r.end - begin < most ? r.end - begin : most;
      x.dots(matrix, begin, count, sums);
      for (int64_t i = 0; i < count; ++i) use(begin + i, sums + i * x.batch);
    }
  }

  // hidden += x W^T for some rows; `copy`, if any, takes the same rows.
  void added(const Matrix& matrix, const Inputs<T>& x, void* copy, Range r) const {
    by_rows(matrix, x, r, [&](int64_t row, const float* sums) {
      for (int64_t b = 0; b < s.batch; ++b) {
        T& place = hidden[b * m.hidden + row];
        place = rounded<T>(value(place) + through<T>(sums[b] + bias(matrix, row)));
        if (copy) static_cast<T*>(copy)[b * m.hidden + row] = place;
      }
    });
  }

  // act = silu(x gate^T) * x up^T for some rows.
  void gated(const Layer& l, const Inputs<T>& x, Range r) const {
    float gates[kHeld], ups[kHeld];
    const int64_t most = even(r.end - r.begin, rows_of(s.batch));
    for (int64_t begin = r.begin; begin < r.end; begin += most) {
      const int64_t count = r.end - begin < most ? r.end - begin : most;
      x.dots(l.gate, begin, count, gates);
      x.dots(l.up, begin, count, ups);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t b = 0; b < s.batch; ++b) {
          float gate = through<T>(gates[i * s.batch + b] + bias(l.gate, begin + i));
          float up = through<T>(ups[i * s.batch + b] + bias(l.up, begin + i));
          act[b * l.inner + begin + i] = rounded<T>(through<T>(silu(gate)) * up);
        }
    }
  }

  // out[i] = <row i of w, x> for N rows of K numbers.
  template <typename Use>
  static void mapped(const float* w, const float* x, int64_t K, int64_t N, Use use) {
    for (int64_t i = 0; i < N; ++i) {
      float sum;
      Dot<float, 1>::run(w + i * K, x, 0, K, &sum);
      use(i, sum);
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
      if (l.running && anchor) std::memcpy(anchor, h, size_t(m.hidden) * sizeof(T));
    }
  }

  // -- a step, as one of several threads -------------------------------------------------------------

  struct Thread {
    Walk walk;
    int64_t count;
    Inputs<T> inputs;
    Array<T> own;  // normed hidden states

    int64_t pieces(int64_t n, int64_t bytes) const { return grain(n, bytes, count); }
  };

  // Queries, and keys and values to where the layer has them, after `length` others.
  void projections(const Layer& l, int64_t length, Thread& t) {
    const Heads heads = heads_of(l);
    const int64_t units = heads.end > heads.first ? (heads.end - heads.first) * heads.blocks : 0;
    const int64_t bytes = 2 * rows_of(s.batch) * row_bytes(l.q.weight ? l.q : l.v, m.hidden);
    bool ready = false;
    t.walk.run(units, t.pieces(units, bytes), [&](Range r) {
      if (!ready) {
        normed(l.attention_norm, t.own.data());
        t.inputs.take(t.own.data(), m.hidden, {&l.q, &l.k, &l.v});
      }
      ready = true;
      for (int64_t unit = r.begin; unit < r.end; ++unit)
        projected(l, length, unit, heads, t.inputs);
    });
  }

  void attention(const Layer& l, int64_t length, Thread& t) {
    const int64_t q_width = l.heads * m.head_dim, items = s.batch * l.heads;
    const int64_t chunks = (length + s.width + kChunk - 1) / kChunk;
    projections(l, length, t);
    t.walk.run(s.batch * l.kv_heads * chunks, 1, [&](Range r) {
      attended(l, length, chunks, r.begin, t.inputs.dense.data());
    });
    t.walk.run(chunks > 1 ? items : 0, 1, [&](Range r) { combined(chunks, r.begin); });
    finished(l.o, mixed, q_width, l.inner ? nullptr : l.anchor, t);
  }

  void mlp(const Layer& l, Thread& t) {
    bool ready = false;
    t.walk.run(l.inner, t.pieces(l.inner, 2 * row_bytes(l.gate, m.hidden)), [&](Range r) {
      if (!ready) {
        normed(l.mlp_norm, t.own.data());
        t.inputs.take(t.own.data(), m.hidden, {&l.gate, &l.up});
      }
      ready = true;
      gated(l, t.inputs, r);
    });
    finished(l.down, act, l.inner, l.anchor, t);
  }

  // The product with which attention or MLP ends.
  void finished(const Matrix& matrix, const T* x, int64_t K, void* copy, Thread& t) {
    bool ready = false;
    t.walk.run(m.hidden, t.pieces(m.hidden, row_bytes(matrix, K)), [&](Range r) {
      if (!ready) t.inputs.take(x, K, {&matrix});
      ready = true;
      added(matrix, t.inputs, copy, r);
    });
  }

  void readout(Thread& t) {
    bool ready = false;
    const int64_t rows = s.logits ? m.vocab : 0;
    t.walk.run(rows, t.pieces(rows, row_bytes(m.head, m.hidden)), [&](Range r) {
      if (!ready) {
        normed(m.norm, t.own.data());
        t.inputs.take(t.own.data(), m.hidden, {&m.head});
      }
      ready = true;
      by_rows(m.head, t.inputs, r, [&](int64_t row, const float* sums) {
        for (int64_t b = 0; b < s.batch; ++b)
          static_cast<T*>(s.logits)[b * m.vocab + row] = rounded<T>(sums[b] + bias(m.head, row));
      });
    });
  }

  void run(int64_t self, int64_t count) {
    int64_t widest = m.hidden > m.inner ? m.hidden : m.inner;
    if (m.heads * m.head_dim > widest) widest = m.heads * m.head_dim;
    Thread t{Walk(phases, self, count), count, Inputs<T>(s.batch, widest),
             Array<T>(size_t(s.batch * m.hidden))};
    t.walk.run(s.batch, 1, [&](Range r) {
      for (int64_t b = r.begin; b < r.end; ++b) {
        if (!s.inputs && !m.embedding) {
          expanded(m.table, s.tokens[b], m.hidden, hidden + b * m.hidden);
          continue;
        }
        const T* from = s.inputs ? at(s.inputs, b * m.hidden)
                                 : at(m.embedding, s.tokens[b] * m.hidden);
        std::memcpy(hidden + b * m.hidden, from, size_t(m.hidden) * sizeof(T));
      }
    });
    int64_t begin = s.first;
    if (s.mixed) {
      const Layer& l = m.layer[begin++];
      finished(l.o, at(s.mixed), l.heads * m.head_dim, nullptr, t);
      if (l.inner) mlp(l, t);
    }
    for (int64_t index = begin; index < s.last; ++index) {
      const Layer& l = m.layer[index];
      if (!s.runs[index]) {  // with those after it that are left out too
        int64_t end = index + 1;
        while (end < s.last && !s.runs[end]) ++end;
        t.walk.run(s.batch, 1, [&](Range r) { stood_in(index, end, r.begin); });
        index = end - 1;
        continue;
      }
      if (l.heads) attention(l, s.lengths[index], t);
      if (l.inner) mlp(l, t);
    }
    t.walk.run(s.outputs ? s.batch : 0, 1, [&](Range r) {
      std::memcpy(static_cast<T*>(s.outputs) + r.begin * m.hidden, hidden + r.begin * m.hidden,
                  size_t(m.hidden) * sizeof(T));
    });
    if (s.queries) {
      Layer next = m.layer[s.last];
      next.keys = s.keys;
      next.values = s.values;
      next.capacity = s.width;
      projections(next, 0, t);
    }
    readout(t);
  }
};

template <typename T>
void decode(const Model* m, const Step* s) {
  Work<T> work(*m, *s);
#pragma omp parallel num_threads(int(s->threads))
  work.run(omp_get_thread_num(), omp_get_num_threads());
}

// y = x W^T, [batch, N], for x [batch, K].
template <typename T>
void product(const Matrix* w, const void* x, void* y, int64_t batch, int64_t N, int64_t K,
             int64_t threads) {
  Phases phases(1, threads);
  const int64_t bytes = Work<T>::row_bytes(*w, K);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t count = omp_get_num_threads();
    Inputs<T> inputs(batch, K);
    bool ready = false;
    Phases::Walk(phases, omp_get_thread_num(), count).run(N, grain(N, bytes, count), [&](Range r) {
      if (!ready) inputs.take(static_cast<const T*>(x), K, {w});
      ready = true;
      Work<T>::by_rows(*w, inputs, r, [&](int64_t row, const float* sums) {
        for (int64_t b = 0; b < batch; ++b) static_cast<T*>(y)[b * N + row] = rounded<T>(sums[b]);
      });
    });
  }
}

// The first of the largest of n numbers, or the first that is none.
template <typename T>
int64_t argmax(const T* x, int64_t n) {
  constexpr int64_t kBlock = 1024, kAbreast = 64;
  float best = -INFINITY;
  int64_t begin = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    float most[kAbreast];
    int odd[kAbreast] = {};
    for (float& m : most) m = -INFINITY;
    int64_t j = i;
    for (; j + kAbreast <= end; j += kAbreast)
      for (int64_t l = 0; l < kAbreast; ++l) {
        const float v = value(x[j + l]);
        most[l] = v > most[l] ? v : most[l];
        odd[l] |= v != v;
      }
    for (; j < end; ++j) {
      const float v = value(x[j]);
      most[0] = v > most[0] ? v : most[0];
      odd[0] |= v != v;
    }
    bool any = false;
    for (int64_t l = 0; l < kAbreast; ++l) {
      any |= odd[l] != 0;
      if (most[l] > best) best = most[l], begin = i;
    }
    if (any) {
      while (value(x[i]) == value(x[i])) ++i;
      return i;
    }
  }
  while (begin + 1 < n && value(x[begin]) != best) ++begin;
  return begin;
}

template <typename T>
void argmaxes(const void* x, int64_t rows, int64_t n, int64_t* out) {
  for (int64_t row = 0; row < rows; ++row) out[row] = argmax(static_cast<const T*>(x) + row * n, n);
}

}  // namespace

extern "C" {
void argmax_bf16(const void* x, int64_t rows, int64_t n, int64_t* out) {
  argmaxes<bf16>(x, rows, n, out);
}
void argmax_f32(const void* x, int64_t rows, int64_t n, int64_t* out) {
  argmaxes<float>(x, rows, n, out);
}
void decode_bf16(const Model* m, const Step* s) { decode<bf16>(m, s); }
void decode_f32(const Model* m, const Step* s) { decode<float>(m, s); }
void product_bf16(const Matrix* w, const void* x, void* y, int64_t batch, int64_t N, int64_t K,
                  int64_t threads) {
  product<bf16>(w, x, y, batch, N, K, threads);
}
void product_f32(const Matrix* w, const void* x, void* y, int64_t batch, int64_t N, int64_t K,
                 int64_t threads) {
  product<float>(w, x, y, batch, N, K, threads);
}
}
