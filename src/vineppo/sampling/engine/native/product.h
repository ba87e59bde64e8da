// Products of a batch of rows with a packed matrix.
//
// Every entry of the result is a sum over k in ascending order, in blocks of INNER terms (with AMX, in one block). It
// therefore has the same bits for every size of the batch.
#pragma once

#include "model.h"
#include "numbers.h"

#if defined(VINEPPO_BF16) && defined(__AMX_BF16__)
#define VINEPPO_TILES
#include "tiles.h"
#endif

namespace vineppo {

// A tile of the result is held in registers: ROWS x (PANELS x 16) numbers. The sizes leave registers for one row of the
// packed matrix. The loops over a tile must be unrolled, or else GCC stores the accumulators to memory in every step.
#if LANES == 16
constexpr int ROWS = 12, PANELS = 2;
#elif LANES == 8
constexpr int ROWS = 6, PANELS = 1;
#elif defined(__aarch64__)
constexpr int ROWS = 6, PANELS = 1;
#else
constexpr int ROWS = 3, PANELS = 1;
#endif
constexpr int INNER = 256;  // terms of a sum that are added up at once
constexpr int VECS = PANEL / LANES;  // vectors of a panel's row

// y = x W^T, or y += x W^T, for R rows of x and P panels of W. `step`: distance of the panels in `w`.
template <int R, int P>
inline __attribute__((always_inline)) void tile(const Number* x, size_t x_stride, const Number* w, size_t step,
                                                int inner, float* y, size_t y_stride, bool add) {
  Vec c[R][P * VECS];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < P * VECS; v++)
      c[r][v] = Vec{};
  for (int k = 0; k < inner; k += PAIR) {
    Terms b[P * VECS];
#pragma GCC unroll 8
    for (int v = 0; v < P * VECS; v++)
      b[v] = load_terms(w + (v / VECS) * step + static_cast<size_t>(k) * PANEL + (v % VECS) * LANES * PAIR);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Terms a = splat_terms(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < P * VECS; v++) c[r][v] = multiply_add(a, b[v], c[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < P * VECS; v++) {
      float* out = y + r * y_stride + v * LANES;
      store(out, add ? load(out) + c[r][v] : c[r][v]);
    }
}

// Call `tile` with R equal to the number of rows.
template <int R, int P>
inline void tile_of(int rows, const Number* x, size_t x_stride, const Number* w, size_t step, int inner, float* y,
                    size_t y_stride, bool add) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, P>(x, x_stride, w, step, inner, y, y_stride, add);
    else
      tile_of<R - 1, P>(rows, x, x_stride, w, step, inner, y, y_stride, add);
  }
}

// y (rows x 16 panels) = x (rows x inner) W^T, or y += ..., for a matrix in panels with the distance `step`.
//
// The sums over k are added up in blocks, because the rounding errors of one long sum are larger. With bfloat16 numbers,
// the product may read x and W up to the next multiple of TERMS terms, where x or W must be 0 and the other one finite,
// and SPARE_ROWS rows behind the last row of x, whose numbers do not matter.
inline void product(const Number* x, int rows, size_t x_stride, const Number* w, int panels, size_t step, int inner,
                    float* y, size_t y_stride, bool add) {
#if defined(VINEPPO_TILES)
  return tiled_product(x, rows, x_stride, w, panels, step, inner, y, y_stride, add);
#endif
  for (int k = 0; k < inner; k += INNER, add = true) {
    const int size = inner - k < INNER ? inner - k : INNER;
    const Number* part = w + static_cast<size_t>(k) * PANEL;
    int p = 0;
    for (; p + PANELS <= panels; p += PANELS)
      for (int r = 0; r < rows; r += ROWS)
        tile_of<ROWS, PANELS>(rows - r < ROWS ? rows - r : ROWS, x + r * x_stride + k, x_stride, part + p * step, step,
                              size, y + r * y_stride + static_cast<size_t>(p) * PANEL, y_stride, add);
    if constexpr (PANELS > 1)
      for (; p < panels; p++)
        for (int r = 0; r < rows; r += ROWS)
          tile_of<ROWS, 1>(rows - r < ROWS ? rows - r : ROWS, x + r * x_stride + k, x_stride, part + p * step, step,
                           size, y + r * y_stride + static_cast<size_t>(p) * PANEL, y_stride, add);
  }
}

// Prepare the processor for the products of a call, because other code of this thread may have changed its state.
inline void begin_products() {
#if defined(VINEPPO_TILES)
  forget_tiles();
#endif
}

// y = x W^T + bias, or y += x W^T + bias. The rows of y have padded(W.columns) numbers.
inline void linear(const float* x, int rows, size_t x_stride, const Packed& w, float* y, size_t y_stride, bool add,
                   Scratch& scratch) {
  const size_t step = static_cast<size_t>(w.inner) * PANEL;
#if defined(VINEPPO_BF16)
  const size_t stride = narrow_stride(w.terms);
  narrow_rows(x, rows, x_stride, w.terms, scratch.narrowed(rows, stride), stride);
  product(scratch.narrowed(rows, stride), rows, stride, w.values.data(), w.panels(), step, w.inner, y, y_stride, add);
#else
  static_cast<void>(scratch);
  product(x, rows, x_stride, w.values.data(), w.panels(), step, w.inner, y, y_stride, add);
#endif
  if (w.bias.empty()) return;
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < padded(w.columns); n += LANES)
      store(y + r * y_stride + n, load(y + r * y_stride + n) + load(w.bias.data() + n));
}

}  // namespace vineppo
