// Vectors of floats in the width of the instruction set that this file is compiled for.
//
// The code uses the vector types of GCC and Clang, so the same source serves every instruction set. The engine is
// compiled once per instruction set, into a library each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace vineppo {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Four numbers, for parts that are shorter than a vector.
typedef float Four __attribute__((vector_size(16)));

inline Four load_four(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_four(float* p, Four v) { std::memcpy(p, &v, sizeof v); }

inline Vec splat(float x) { return Vec{} + x; }

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

inline float largest(Vec v) {
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) with a relative error of about 1e-7; 0 below -87.3, a large finite number above 88, and NaN for NaN.
// x = n log 2 + r with |r| <= log(2) / 2; exp(r) is a polynomial (coefficients of the Cephes library by S. Moshier).
inline Vec exponential(Vec x) {
  const Vec lowest = splat(-87.33654f);
  const IntVec tiny = x < lowest, unequal = x != x;
  const Vec given = x;
  x = minimum(maximum(x, lowest), splat(88.0f));
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec n = (x * 1.44269504088896341f + shift) - shift;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec y = (p * (r * r) + r) + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return unequal ? given : tiny ? Vec{} : y * power;
}

// tanh(x) with an absolute error of about 1e-7.
inline Vec hyperbolic_tangent(Vec x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace vineppo
