// One position of each sequence through linear attention, from queries, keys and values to the normed
// output (native.py says of what): features, the state's step, what queries read of it, the norm.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../decode/kernels/numbers.h"

namespace {

enum Kind : int64_t { kSoftmax, kExp, kPrf, kElu };

constexpr float kLargest = 10.0f;     // where exponents are cut
constexpr int64_t kShared = 1 << 18;  // products of a step from which on several threads pay

struct Step {
  const float *queries, *keys, *values;  // [batch, heads or kv_heads, width]
  const float *directions, *gain;        // [width, width], [width]; null where the kind has none
  const float* gamma;                    // [kv_heads]
  const float *query_factors, *key_factors;  // [batch, kv_heads]; null for ones
  const float *weight, *bias;                // [heads width]
  const float* before;                       // [batch, kv_heads, width, width]; null for nothing
  float *after, *out;                        // as before; [batch, heads width]
  int64_t batch, heads, kv_heads, width, groups, kind, threads;
  float eps;
};

// out[j] = sum over i of x[i] P[i][j]
void turned(const float* x, const float* p, int64_t n, float* out) {
  std::fill(out, out + n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const float own = x[i];
    const float* row = p + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += own * row[j];
  }
}

float cut_exponential(float x) { return exponential(x > kLargest ? kLargest : x); }

// The features of x, multiplied by a factor; `room` is as wide.
void features(const Step& s, const float* x, float factor, float* room, float* out) {
  const int64_t n = s.width;
  if (s.kind == kElu) {
    for (int64_t j = 0; j < n; ++j) out[j] = factor * (x[j] > 0 ? x[j] + 1 : exponential(x[j]));
    return;
  }
  float less = 0;
  if (s.kind == kPrf) {
    const float scale = 1.0f / std::sqrt(std::sqrt(float(n)));
    for (int64_t j = 0; j < n; ++j) {
      room[j] = x[j] * scale;
      less += room[j] * room[j] / 2;
    }
    x = room;
  }
  turned(x, s.directions, n, out);
  if (s.kind == kSoftmax) {
    float largest = out[0], total = 0;
    for (int64_t j = 1; j < n; ++j) largest = out[j] > largest ? out[j] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; ++j) {
      out[j] = exponential(out[j] - largest);
      total += out[j];
    }
    factor /= total;
  } else {
    if (s.kind == kPrf) factor /= std::sqrt(float(n));
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = cut_exponential(out[j] - less);
    for (int64_t j = 0; j < n && s.kind == kExp; ++j) out[j] *= s.gain[j];
  }
  for (int64_t j = 0; j < n; ++j) out[j] *= factor;
}

// One key head of one sequence, and the query heads that read its state.
void head(const Step& s, int64_t item) {
  const int64_t n = s.width, g = item % s.kv_heads, each = s.heads / s.kv_heads;
  Array<float> made(size_t((each + 2) * n));
  float *room = made.data(), *key = room + n, *asked = key + n;
  features(s, s.keys + item * n, s.key_factors ? s.key_factors[item] : 1.0f, room, key);
  for (int64_t r = 0; r < each; ++r) {
    const float factor = s.query_factors ? s.query_factors[item] : 1.0f;
    features(s, s.queries + (item * each + r) * n, factor, room, asked + r * n);
  }
  const float *v = s.values + item * n, gamma = s.gamma[g];
  float *out = s.out + item * each * n, *after = s.after + item * n * n;
  const float* before = s.before ? s.before + item * n * n : nullptr;
  std::fill(out, out + each * n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    float* row = after + i * n;
    const float own = key[i];
    if (before) {
      const float* past = before + i * n;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) row[j] = gamma * past[j] + own * v[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) row[j] = own * v[j];
    }
    for (int64_t r = 0; r < each; ++r) {
      const float by = asked[r * n + i];
      float* y = out + r * n;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) y[j] += by * row[j];
    }
  }
}

void normed(const Step& s, int64_t sequence) {
  const int64_t all = s.heads * s.width, count = all / s.groups;
  float* y = s.out + sequence * all;
  for (int64_t start = 0; start < all; start += count) {
    float total = 0, squares = 0;
    for (int64_t j = start; j < start + count; ++j) total += y[j];
    const float mean = total / float(count);
    for (int64_t j = start; j < start + count; ++j) squares += (y[j] - mean) * (y[j] - mean);
    const float scale = 1.0f / std::sqrt(squares / float(count) + s.eps);
    for (int64_t j = start; j < start + count; ++j)
      y[j] = (y[j] - mean) * scale * s.weight[j] + s.bias[j];
  }
}

}  // namespace

extern "C" void step(const Step* s) {
  const int64_t items = s->batch * s->kv_heads;
  const int64_t work = s->batch * (2 * s->heads + 2 * s->kv_heads) * s->width * s->width;
#pragma omp parallel for num_threads(int(s->threads)) if (work > kShared)
  for (int64_t item = 0; item < items; ++item) head(*s, item);
#pragma omp parallel for num_threads(int(s->threads)) if (work > kShared)
  for (int64_t sequence = 0; sequence < s->batch; ++sequence) normed(*s, sequence);
}
