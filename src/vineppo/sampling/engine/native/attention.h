// Attention of rows to their trunks and branches.
//
// Rows on the same trunk are computed together: their queries are a matrix, and the keys and values of the trunk are
// packed matrices. Positions that a row does not attend to get weight 0, which does not change a sum, so a row's result
// has the same bits whatever rows are computed with it.
#pragma once

#include <algorithm>

#include "product.h"

namespace vineppo {

// Scores of at most about this many numbers are computed at once, so that they stay in the cache of a core.
constexpr size_t SCORES_AT_ONCE = 1 << 16;

// Store the keys and values of a token. With bfloat16 numbers, products read the values of a few positions behind the
// last one, which must be finite. Therefore the first token of POSITIONS positions clears them.
inline void remember(const Shape& s, int layer, const float* keys, const float* values, Cache& cache, int slot) {
  const int d = s.head_dim, columns = s.padded_head();
  for (int h = 0; h < s.kv_heads; h++, keys += d, values += d) {
    Number* k = cache.keys(layer, h) + packed_index(slot, 0, s.head_terms());
    for (int i = 0; i < s.head_terms(); i += PAIR, k += PAIR * PANEL)
      for (int j = 0; j < PAIR; j++) k[j] = i + j < d ? narrow(keys[i + j]) : Number{};
    for (int i = 0; i < columns; i += PANEL) {
      Number* v = cache.values(layer, h) + packed_index(i, slot, cache.capacity());
      if (NARROW && slot % POSITIONS == 0) std::memset(v, 0, POSITIONS * PANEL * sizeof(Number));
      for (int j = 0; j < PANEL; j++) v[j * PAIR] = i + j < d ? narrow(values[i + j]) : Number{};
    }
  }
}

// A range of positions [begin, end) in the scores of a row.
struct Range {
  int begin, end;
};

// Replace scores by exp(score - maximum) in the ranges, and return the sum of the results. The numbers between
// the range and the multiples of POSITIONS before and behind it become 0.
inline float exponentials(float* scores, const Range (&ranges)[2], float softcap) {
  float top = -INFINITY;
  for (const Range& range : ranges) {
    int i = range.begin;
    if (softcap > 0)
      for (; i < range.end; i++) scores[i] = softcap * std::tanh(scores[i] / softcap);
    i = range.begin;
    for (; i < range.end && i % LANES != 0; i++) top = std::max(top, scores[i]);
    if (i + LANES <= range.end) {
      Vec best = load(scores + i);
      for (; i + LANES <= range.end; i += LANES) best = maximum(best, load(scores + i));
      top = std::max(top, largest(best));
    }
    for (; i < range.end; i++) top = std::max(top, scores[i]);
  }
  Vec total{};
  for (const Range& range : ranges) {
    if (range.begin >= range.end) continue;
    const int first = range.begin / POSITIONS * POSITIONS, last = padded_positions(range.end);
    for (int i = first; i < range.begin; i++) scores[i] = -INFINITY;
    for (int i = range.end; i < last; i++) scores[i] = -INFINITY;
    for (int i = first; i < last; i += LANES) {
      const Vec weight = exponential(load(scores + i) - top);
      store(scores + i, weight);
      total += weight;
    }
  }
  return sum(total);
}

// The rows of weights (rows x columns) in the numbers of the values.
inline const Number* narrowed_weights(const float* weights, int rows, int columns, Scratch& scratch, size_t* stride) {
#if defined(VINEPPO_BF16)
  *stride = narrow_stride(columns);
  Number* narrowed = Scratch::grown(scratch.narrow_scores, (rows + SPARE_ROWS) * *stride);
  narrow_rows(weights, rows, columns, columns, narrowed, *stride);
  return narrowed;
#else
  static_cast<void>(rows), static_cast<void>(scratch);
  *stride = columns;
  return weights;
#endif
}

// Attention of rows [0, count), which have the same trunk, for all heads of a layer. `scratch.qkv` has the queries, and
// `scratch.attended` receives the results.
inline void attend_together(const Model& model, int layer, const Row* rows, int count, const float* qkv,
                            float* attended, Scratch& scratch) {
  const Shape& s = model.shape;
  const int d = s.head_dim, group = s.heads / s.kv_heads, window = model.layers[layer].window;
  const int qkv_stride = padded(s.qkv_columns()), out_stride = s.query_columns();
  int trunk_end = 0, branch_end = 0, trunk_begin = 1 << 30;
  auto first_position = [&](const Row& row) { return window ? std::max(0, row.position - window + 1) : 0; };
  for (int r = 0; r < count; r++) {
    const int begin = first_position(rows[r]);
    branch_end = std::max(branch_end, rows[r].branch_length);
    if (begin >= rows[r].trunk_length) continue;  // the row attends to its branch only
    trunk_end = std::max(trunk_end, rows[r].trunk_length);
    trunk_begin = std::min(trunk_begin, begin);
  }
  // A product adds up blocks of INNER positions. They must begin at the same positions for all sets of rows.
  trunk_begin = trunk_end ? trunk_begin / INNER * INNER : 0;
  const int trunk_span = padded_positions(trunk_end) - trunk_begin;
  const int stride = trunk_span + padded_positions(branch_end), terms = s.head_terms();
  const size_t lines = static_cast<size_t>(count) * group;
  float* scores = Scratch::grown(scratch.scores, lines * stride);
  Number* queries = scratch.queries.data();
  float* mixed = scratch.mixed.data();
  float* totals = scratch.sums.data();
  const Cache* trunk = rows[0].trunk;
  for (int h = 0; h < s.kv_heads; h++) {
    for (size_t line = 0; line < lines; line++) {
      const float* q = qkv + line / group * qkv_stride + (h * group + line % group) * d;
      for (int i = 0; i < terms; i++) queries[line * terms + i] = i < d ? narrow(q[i] * s.attention_scale) : Number{};
    }
    if (trunk_end)
      product(queries, static_cast<int>(lines), terms, trunk->keys(layer, h) + static_cast<size_t>(trunk_begin) * terms,
              trunk_span / PANEL, static_cast<size_t>(terms) * PANEL, terms, scores, stride, false);
    for (int r = 0; r < count; r++) {
      const Row& row = rows[r];
      float* own = scores + static_cast<size_t>(r) * group * stride;
      if (row.branch_length)
        product(queries + r * group * terms, group, terms, row.branch->keys(layer, h), padded(row.branch_length) / PANEL,
                static_cast<size_t>(terms) * PANEL, terms, own + trunk_span, stride, false);
      const int begin = first_position(row);
      const Range ranges[2] = {
          {std::min(begin, row.trunk_length) - trunk_begin, row.trunk_length - trunk_begin},
          {trunk_span + std::max(0, begin - row.trunk_length), trunk_span + row.branch_length},
      };
      for (int j = 0; j < group; j++) {
        float* line = own + j * stride;
        totals[r * group + j] = exponentials(line, ranges, s.attention_softcap);
        if (ranges[0].begin >= ranges[0].end) {
          std::fill(line, line + trunk_span, 0.0f);
        } else {
          std::fill(line, line + ranges[0].begin / POSITIONS * POSITIONS, 0.0f);
          std::fill(line + padded_positions(ranges[0].end), line + trunk_span, 0.0f);
        }
        if (ranges[1].begin < ranges[1].end)
          std::fill(line + trunk_span, line + ranges[1].begin / POSITIONS * POSITIONS, 0.0f);
      }
    }
    size_t weights_stride;
    const Number* weights = narrowed_weights(scores, static_cast<int>(lines), stride, scratch, &weights_stride);
    const int mixed_stride = s.padded_head();
    if (trunk_end)
      product(weights, static_cast<int>(lines), weights_stride,
              trunk->values(layer, h) + static_cast<size_t>(trunk_begin) * PANEL, mixed_stride / PANEL,
              static_cast<size_t>(trunk->capacity()) * PANEL, trunk_end - trunk_begin, mixed, mixed_stride, false);
    else
      std::fill(mixed, mixed + lines * mixed_stride, 0.0f);
    for (int r = 0; r < count; r++) {
      const Row& row = rows[r];
      float* own = mixed + static_cast<size_t>(r) * group * mixed_stride;
      if (row.branch_length)
        product(weights + static_cast<size_t>(r) * group * weights_stride + trunk_span, group, weights_stride,
                row.branch->values(layer, h), mixed_stride / PANEL, static_cast<size_t>(row.branch->capacity()) * PANEL,
                row.branch_length, own, mixed_stride, true);
      for (int j = 0; j < group; j++) {
        const float scale = 1.0f / totals[r * group + j];
        float* out = attended + static_cast<size_t>(r) * out_stride + (h * group + j) * d;
        for (int i = 0; i < d; i++) out[i] = own[j * mixed_stride + i] * scale;
      }
    }
  }
}

// Attention of all rows of a batch. Rows with the same trunk should stand beside each other.
inline void attend(const Model& model, int layer, const Row* rows, int count, Scratch& scratch) {
  const Shape& s = model.shape;
  for (int begin = 0, end; begin < count; begin = end) {
    const size_t row_scores = static_cast<size_t>(s.heads / s.kv_heads) *
                              (padded(rows[begin].trunk_length) + padded(rows[begin].branch_length) + 2 * POSITIONS);
    const int most = static_cast<int>(std::max<size_t>(1, SCORES_AT_ONCE / row_scores));
    for (end = begin + 1; end < count && end - begin < most && rows[end].trunk == rows[begin].trunk;) end++;
    attend_together(model, layer, rows + begin, end - begin,
                    scratch.qkv.data() + static_cast<size_t>(begin) * padded(s.qkv_columns()),
                    scratch.attended.data() + static_cast<size_t>(begin) * s.query_columns(), scratch);
  }
}

}  // namespace vineppo
