// Numbers of the model's dtype, and registers of float32 numbers on any machine.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Registers of 64 bytes with all that products of codes take.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define WIDE 1
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

// Memory that begins with a line of the cache, so that no register is loaded across two of them.
template <typename T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <typename U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }

 private:
  static constexpr std::align_val_t kLine{64};
};
template <typename T>
using Array = std::vector<T, Lines<T>>;

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

// -- one register of float32 numbers -------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Lanes {
  static constexpr int kCount = 16;
  __m512 v;
  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes of(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load(const bf16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  Lanes plus(Lanes a, Lanes b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }  // this + a b
  Lanes operator+(Lanes o) const { return {_mm512_add_ps(v, o.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

#elif defined(__AVX2__) && defined(__FMA__)

struct Lanes {
  static constexpr int kCount = 8;
  __m256 v;
  static Lanes zero() { return {_mm256_setzero_ps()}; }
  static Lanes of(float x) { return {_mm256_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Lanes load(const bf16* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  Lanes plus(Lanes a, Lanes b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
  Lanes operator+(Lanes o) const { return {_mm256_add_ps(v, o.v)}; }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

#else

struct Lanes {  // what compilers make registers of
  static constexpr int kCount = 8;
  float v[kCount];
  static Lanes of(float x) {
    Lanes out;
    for (float& y : out.v) y = x;
    return out;
  }
  static Lanes zero() { return of(0.0f); }
  template <typename T>
  static Lanes load(const T* p) {
    Lanes out;
    for (int i = 0; i < kCount; ++i) out.v[i] = value(p[i]);
    return out;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof(v)); }
  Lanes plus(Lanes a, Lanes b) const {
    Lanes out;
    for (int i = 0; i < kCount; ++i) out.v[i] = v[i] + a.v[i] * b.v[i];
    return out;
  }
  Lanes operator+(Lanes o) const {
    for (int i = 0; i < kCount; ++i) o.v[i] += v[i];
    return o;
  }
  float sum() const {
    float out = 0;
    for (float x : v) out += x;
    return out;
  }
};

#endif

}  // namespace
