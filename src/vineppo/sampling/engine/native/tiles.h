// Products of bfloat16 matrices with the tile registers of AMX, which multiply 16 x 32 by 32 x 16 numbers at once.
//
// Every entry of a result is a sum over k in ascending order, whatever rows and panels are computed with it.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace vineppo {

constexpr int TILE = 16;  // rows of a tile

// The number of rows that the tile registers of this thread have, 0 if unknown. Other code of the thread may change the
// registers between two calls of the engine, so a call starts with `forget_tiles`.
inline thread_local int tile_rows = 0;

inline void forget_tiles() { tile_rows = 0; }

// Let the compiler finish all stores to memory that the tile instructions behind this call read. The intrinsics of GCC do
// not say that they read it (GCC bug 114098), so the compiler may leave such stores out, or do them later.
inline void finish_stores(const void* a, const void* b) { asm volatile("" : : "r"(a), "r"(b) : "memory"); }

// Set the rows of the tiles of x (4, 5) and of the results (0 to 3). The tiles of the packed matrix (6, 7) have 16.
inline void configure_tiles(int rows) {
  if (rows == tile_rows) return;
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : TILE);
  }
  finish_stores(&config, nullptr);
  _tile_loadconfig(&config);
  tile_rows = rows;
}

// Ask for a tile that will be loaded soon. The processor alone does not read far enough ahead. The empty assembly keeps
// the compiler from holding an address per line in memory.
inline void prefetch_tile(const Number* tile) {
  asm("" : "+r"(tile));
  for (int i = 0; i < TILE; i++) __builtin_prefetch(tile + i * TERMS);
}

// y = x W^T, or y += x W^T, for R tiles of rows of x and P panels of W. With `ahead`, the next P panels are prefetched.
template <int R, int P>
inline void tile_product(const Number* x, size_t x_stride, const Number* w, size_t step, int inner, float* y,
                         size_t y_stride, bool add, bool ahead) {
  const size_t x_bytes = x_stride * sizeof(Number), y_bytes = y_stride * sizeof(float);
  const Number* x2 = x + TILE * x_stride;
  float* y2 = y + TILE * y_stride;
  finish_stores(x, y);
  if (add) {
    _tile_loadd(0, y, y_bytes);
    if constexpr (P > 1) _tile_loadd(1, y + PANEL, y_bytes);
    if constexpr (R > 1) _tile_loadd(2, y2, y_bytes);
    if constexpr (R > 1 && P > 1) _tile_loadd(3, y2 + PANEL, y_bytes);
  } else {
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && P > 1) _tile_zero(3);
  }
  for (int k = 0; k < inner; k += TERMS) {
    const Number* panel = w + static_cast<size_t>(k) * PANEL;
    if (ahead)
      for (int p = 0; p < P; p++) prefetch_tile(panel + (P + p) * step);
    _tile_loadd(6, panel, 64);
    if constexpr (P > 1) _tile_loadd(7, panel + step, 64);
    _tile_loadd(4, x + k, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) {
      _tile_loadd(5, x2 + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, y_bytes);
  if constexpr (P > 1) _tile_stored(1, y + PANEL, y_bytes);
  if constexpr (R > 1) _tile_stored(2, y2, y_bytes);
  if constexpr (R > 1 && P > 1) _tile_stored(3, y2 + PANEL, y_bytes);
}

// The same for fewer rows than the tiles have: the tile of results is copied row by row.
template <int P>
inline void tile_product_of_few(const Number* x, int rows, size_t x_stride, const Number* w, size_t step, int inner,
                                float* y, size_t y_stride, bool add, bool ahead) {
  alignas(64) float result[TILE * P * PANEL];
  if (add)
    for (int r = 0; r < rows; r++) std::memcpy(result + r * P * PANEL, y + r * y_stride, P * PANEL * sizeof(float));
  tile_product<1, P>(x, x_stride, w, step, inner, result, P * PANEL, add, ahead);
  for (int r = 0; r < rows; r++) std::memcpy(y + r * y_stride, result + r * P * PANEL, P * PANEL * sizeof(float));
}

// All rows for P panels.
template <int P>
inline void panel_product(const Number* x, int rows, size_t x_stride, const Number* w, size_t step, int inner, float* y,
                          size_t y_stride, bool add) {
  int r = 0;
  for (; r + 2 * TILE <= rows; r += 2 * TILE)
    tile_product<2, P>(x + r * x_stride, x_stride, w, step, inner, y + r * y_stride, y_stride, add, r == 0);
  for (; r + tile_rows <= rows; r += tile_rows)
    tile_product<1, P>(x + r * x_stride, x_stride, w, step, inner, y + r * y_stride, y_stride, add, r == 0);
  if (r < rows)
    tile_product_of_few<P>(x + r * x_stride, rows - r, x_stride, w, step, inner, y + r * y_stride, y_stride, add,
                           r == 0);
}

// See `product` in product.h. `inner` is rounded up to a multiple of TERMS.
inline void tiled_product(const Number* x, int rows, size_t x_stride, const Number* w, int panels, size_t step,
                          int inner, float* y, size_t y_stride, bool add) {
  configure_tiles(rows < TILE ? rows : TILE);
  inner = rounded_up(inner, TERMS);
  int p = 0;
  for (; p + 2 <= panels; p += 2)
    panel_product<2>(x, rows, x_stride, w + p * step, step, inner, y + static_cast<size_t>(p) * PANEL, y_stride, add);
  if (p < panels)
    panel_product<1>(x, rows, x_stride, w + p * step, step, inner, y + static_cast<size_t>(p) * PANEL, y_stride, add);
}

}  // namespace vineppo
