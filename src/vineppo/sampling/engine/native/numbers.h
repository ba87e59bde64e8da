// The numbers in which weights, keys and values are stored: float32, or bfloat16 in libraries that are compiled with
// VINEPPO_BF16.
//
// Products of bfloat16 numbers are added up in float32. All other computations are in float32 in every library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#if defined(VINEPPO_BF16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace vineppo {

// Columns of a packed weight, and positions of packed keys, are stored in panels of this many.
constexpr int PANEL = 16;

inline int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int padded(int n) { return rounded_up(n, PANEL); }

#if defined(VINEPPO_BF16)

typedef uint16_t Number;
constexpr int PAIR = 2;    // this many consecutive terms of a sum stand beside each other in a packed matrix
constexpr int TERMS = 32;  // sums have a multiple of this many terms; the missing ones are 0

inline float widen(Number x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// The nearest bfloat16 number; the even one of two that are equally near.
inline Number narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<Number>((bits >> 16) | 64);
  return static_cast<Number>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// PAIR terms of LANES sums.
typedef IntVec Terms;

inline Terms load_terms(const Number* p) {
  Terms v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Terms splat_terms(const Number* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return Terms{} + pair;
}

// c + a1 b1 + a2 b2 in every lane.
inline Vec multiply_add(Terms a, Terms b, Vec c) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const IntVec a1 = a << 16, b1 = b << 16, a2 = a & ~0xffff, b2 = b & ~0xffff;
  return c + (Vec)a1 * (Vec)b1 + (Vec)a2 * (Vec)b2;
#endif
}

// Copy rows of float32 numbers as bfloat16 numbers, followed by zeros up to a multiple of TERMS.
inline void narrow_rows(const float* from, int rows, size_t from_stride, int columns, Number* to, size_t to_stride) {
  for (int r = 0; r < rows; r++, from += from_stride, to += to_stride) {
    int i = 0;
#if defined(__AVX512BF16__)
    for (; i + LANES <= columns; i += LANES) {
      const __m256bh half = _mm512_cvtneps_pbh((__m512)load(from + i));
      std::memcpy(to + i, &half, sizeof half);
    }
#endif
    for (; i < columns; i++) to[i] = narrow(from[i]);
    for (; i % TERMS != 0; i++) to[i] = 0;
  }
}

#else

typedef float Number;
constexpr int PAIR = 1;
constexpr int TERMS = 1;

inline float widen(float x) { return x; }
inline float narrow(float x) { return x; }

typedef Vec Terms;

inline Terms load_terms(const float* p) { return load(p); }
inline Terms splat_terms(const float* p) { return splat(*p); }
inline Vec multiply_add(Terms a, Terms b, Vec c) { return c + a * b; }

#endif

// Numbers are narrowed into a buffer for a product, or used where they are if they have the right type.
constexpr bool NARROW = sizeof(Number) != sizeof(float);
// Distance of two rows of narrowed numbers. A power of two would map all rows to the same few lines of the cache, so
// the distance is 32 numbers longer than a row.
inline size_t narrow_stride(int columns) { return static_cast<size_t>(rounded_up(columns, TERMS)) + 32; }
// A product may read this many rows behind the last one.
constexpr int SPARE_ROWS = NARROW ? 16 : 0;
// Positions whose scores and values are computed together. Scores at missing positions are 0.
constexpr int POSITIONS = TERMS > PANEL ? TERMS : PANEL;

inline int padded_positions(int n) { return rounded_up(n, POSITIONS); }

// The index of entry (n, k) in a packed matrix with `inner` columns, which is a multiple of PAIR.
inline size_t packed_index(int n, int k, int inner) {
  return (static_cast<size_t>(n / PANEL) * inner + k / PAIR * PAIR) * PANEL + n % PANEL * PAIR + k % PAIR;
}

}  // namespace vineppo
