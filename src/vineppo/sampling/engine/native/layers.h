// The parts of a layer besides products and attention: norms, rotary positions, activations, embeddings.
#pragma once

#include "model.h"
#include "vectors.h"

namespace vineppo {

// y = x / sqrt(mean(x^2) + epsilon) * weight, for `size` numbers. y may be x.
inline void rms_norm(const float* x, const Array<float>& weight, int size, float epsilon, float* y) {
  Vec squares{};
  int i = 0;
  for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / size + epsilon);
  for (i = 0; i + LANES <= size; i += LANES) store(y + i, load(weight.data() + i) * (load(x + i) * scale));
  for (; i < size; i++) y[i] = weight[i] * (x[i] * scale);
}

// Rotate the two halves of a head by the angles of a position.
inline void rotate(float* head, const float* cosine, const float* sine, int size) {
  const int half = size / 2;
  auto turn = [&](auto a, auto b, int i, auto read, auto write) {
    write(head + i, a * read(cosine + i) - b * read(sine + i));
    write(head + i + half, b * read(cosine + i + half) + a * read(sine + i + half));
  };
  int i = 0;
  for (; i + 4 <= half; i += 4)
    turn(load_four(head + i), load_four(head + i + half), i, load_four, [](float* p, Four v) { store_four(p, v); });
  for (; i < half; i++)
    turn(head[i], head[i + half], i, [](const float* p) { return *p; }, [](float* p, float x) { *p = x; });
}

template <Activation activation>
inline Vec activate(Vec x) {
  if constexpr (activation == Activation::silu) return x / (1.0f + exponential(-x));
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// gate = activation(gate) * up. The vectors may reach beyond `size`: there they overwrite entries of `up` that are no
// longer needed, or padding.
template <Activation activation>
inline void gated(float* gate, const float* up, int size) {
  for (int i = 0; i < size; i += LANES) store(gate + i, activate<activation>(load(gate + i)) * load(up + i));
}

inline void gated(Activation activation, float* gate, const float* up, int size) {
  if (activation == Activation::silu) return gated<Activation::silu>(gate, up, size);
  if (activation == Activation::gelu_tanh) return gated<Activation::gelu_tanh>(gate, up, size);
  for (int i = 0; i < size; i++) gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.7071067811865476f)) * up[i];
}

// The embedding of a token, times the model's factor.
inline void embed(const Model& model, int token, float* x) {
  const Shape& s = model.shape;
  if (!s.tied) {
    const float* row = model.embedding.data() + static_cast<size_t>(token) * s.hidden;
    for (int k = 0; k < s.hidden; k++) x[k] = row[k] * s.embedding_scale;
    return;
  }
  const Number* column = model.head.values.data() + packed_index(token, 0, model.head.inner);
  for (int k = 0; k < s.hidden; k += PAIR, column += PAIR * PANEL)
    for (int i = 0; i < PAIR && k + i < s.hidden; i++) x[k + i] = widen(column[i]) * s.embedding_scale;
}

}  // namespace vineppo
