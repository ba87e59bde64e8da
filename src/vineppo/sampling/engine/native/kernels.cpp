#include "kernels.h"

#include <algorithm>

#include "attention.h"
#include "layers.h"
#include "product.h"

namespace vineppo {

void pack(const float* source, int rows, int inner, Packed& target, int offset) {
  // A few rows at a time, because the columns of a row are far apart in a panel.
  for (int begin = 0; begin < rows; begin += PANEL)
    for (int k = 0; k < inner; k++)
      for (int n = begin; n < std::min(begin + PANEL, rows); n++)
        target.values[packed_index(offset + n, k, target.inner)] = narrow(source[static_cast<size_t>(n) * inner + k]);
}

void forward(const Model& model, const Row* rows, int count, Scratch& scratch) {
  const Shape& s = model.shape;
  const int stride = padded(s.hidden), qkv_stride = padded(s.qkv_columns());
  const int gate_stride = padded(2 * s.intermediate), d = s.head_dim;
  begin_products();
  float* residual = scratch.residual.data();
  float* normed = scratch.normed.data();
  float* qkv = scratch.qkv.data();
  float* gate_up = scratch.gate_up.data();
  for (int r = 0; r < count; r++) embed(model, rows[r].token, residual + static_cast<size_t>(r) * stride);
  auto norm_rows = [&](const float* x, const Array<float>& weight, float* y) {
    for (int r = 0; r < count; r++)
      rms_norm(x + static_cast<size_t>(r) * stride, weight, s.hidden, s.epsilon, y + static_cast<size_t>(r) * stride);
  };
  // residual += product, or residual += norm(product) if the model has a norm behind the product.
  auto add_product = [&](const float* x, size_t x_stride, const Packed& w, const Array<float>& norm) {
    if (norm.empty()) return linear(x, count, x_stride, w, residual, stride, true, scratch);
    linear(x, count, x_stride, w, normed, stride, false, scratch);
    norm_rows(normed, norm, normed);
    for (size_t i = 0; i < static_cast<size_t>(count) * stride; i += LANES)
      store(residual + i, load(residual + i) + load(normed + i));
  };
  for (int l = 0; l < s.layers; l++) {
    const Layer& layer = model.layers[l];
    norm_rows(residual, layer.before_attention, normed);
    linear(normed, count, stride, layer.qkv, qkv, qkv_stride, false, scratch);
    for (int r = 0; r < count; r++) {
      float* q = qkv + static_cast<size_t>(r) * qkv_stride;
      const size_t at = static_cast<size_t>(rows[r].position) * d;
      const float* cosine = model.cosines[layer.rope_table].data() + at;
      const float* sine = model.sines[layer.rope_table].data() + at;
      for (int h = 0; h < s.heads + s.kv_heads; h++) {
        const Array<float>& norm = h < s.heads ? layer.query_norm : layer.key_norm;
        if (!norm.empty()) rms_norm(q + h * d, norm, d, s.epsilon, q + h * d);
        rotate(q + h * d, cosine, sine, d);
      }
      const float* keys = q + s.query_columns();
      remember(s, l, keys, keys + s.kv_heads * d, *rows[r].target, rows[r].slot);
    }
    attend(model, l, rows, count, scratch);
    add_product(scratch.attended.data(), s.query_columns(), layer.output, layer.after_attention);
    norm_rows(residual, layer.before_mlp, normed);
    linear(normed, count, stride, layer.gate_up, gate_up, gate_stride, false, scratch);
    for (int r = 0; r < count; r++) {
      float* gate = gate_up + static_cast<size_t>(r) * gate_stride;
      gated(s.activation, gate, gate + s.intermediate, s.intermediate);
    }
    add_product(gate_up, gate_stride, layer.down, layer.after_mlp);
  }
  norm_rows(residual, model.final_norm, normed);
}

void logits(const Model& model, const float* hidden, int count, float* out, Scratch& scratch) {
  begin_products();
  const Shape& s = model.shape;
  const int columns = padded(s.vocabulary);
  linear(hidden, count, padded(s.hidden), model.head, out, columns, false, scratch);
  if (s.logit_softcap > 0)
    for (size_t i = 0; i < static_cast<size_t>(count) * columns; i++)
      out[i] = s.logit_softcap * std::tanh(out[i] / s.logit_softcap);
}

int draw(float* z, int size, double uniform, float temperature, float* logprob, Scratch& scratch) {
  if (temperature != 1 && temperature != 0)
    for (int i = 0; i < size; i++) z[i] /= temperature;
  for (int i = size; i < padded(size); i++) z[i] = -INFINITY;
  Vec best = load(z);
  IntVec unequal = best != best;  // NaN differs from itself
  for (int i = LANES; i < padded(size); i += LANES) {
    best = maximum(best, load(z + i));
    unequal |= load(z + i) != load(z + i);
  }
  const float top = largest(best);
  bool finite = std::isfinite(top);
  for (int i = 0; i < LANES; i++) finite = finite && !unequal[i];
  if (!finite) return -1;
  if (temperature == 0) {
    *logprob = 0;
    return static_cast<int>(std::find(z, z + size, top) - z);
  }
  float* weights = scratch.weights.data();
  double* sums = scratch.block_sums.data();  // the sum of the weights up to the end of each block
  double total = 0;
  int blocks = 0;
  for (int begin = 0; begin < size; begin += BLOCK, blocks++) {
    Vec block{};
    for (int i = begin; i < std::min(begin + BLOCK, padded(size)); i += LANES) {
      const Vec weight = exponential(load(z + i) - top);
      store(weights + i, weight);
      block += weight;
    }
    total += sum(block);
    sums[blocks] = total;
  }
  const double level = std::min(uniform * total, std::nextafter(total, 0.0));
  const int block = std::min(static_cast<int>(std::upper_bound(sums, sums + blocks, level) - sums), blocks - 1);
  double reached = block ? sums[block - 1] : 0;
  int drawn = -1;
  for (int i = block * BLOCK; i < std::min(block * BLOCK + BLOCK, size); i++) {
    if (weights[i] <= 0) continue;
    reached += weights[i];
    drawn = i;
    if (reached > level) break;
  }
  *logprob = static_cast<float>(static_cast<double>(z[drawn] - top) - std::log(total));
  return drawn;
}

}  // namespace vineppo
