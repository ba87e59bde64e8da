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

namespace {

// The weights exp(logit / temperature - top) of all tokens are in `scratch.weights`, and the sums of the weights up to
// the end of each block in `scratch.block_sums`.
struct Weights {
  bool finite;
  float top;
  double total;
  int blocks;

  float logprob(float z) const { return static_cast<float>(static_cast<double>(z - top) - std::log(total)); }
};

// Divide the logits by the temperature, and find the largest. Returns false if one of them is not a number, or if the
// largest is not finite.
bool scale(float* z, int size, float temperature, float* top) {
  if (temperature != 1 && temperature != 0)
    for (int i = 0; i < size; i++) z[i] /= temperature;
  for (int i = size; i < padded(size); i++) z[i] = -INFINITY;
  Vec best = load(z);
  IntVec unequal = best != best;  // NaN differs from itself
  for (int i = LANES; i < padded(size); i += LANES) {
    best = maximum(best, load(z + i));
    unequal |= load(z + i) != load(z + i);
  }
  *top = largest(best);
  bool finite = std::isfinite(*top);
  for (int i = 0; i < LANES; i++) finite = finite && !unequal[i];
  return finite;
}

Weights weigh(float* z, int size, float temperature, Scratch& scratch) {
  Weights made{};
  made.finite = scale(z, size, temperature, &made.top);
  if (!made.finite) return made;
  float* weights = scratch.weights.data();
  for (int begin = 0; begin < size; begin += BLOCK, made.blocks++) {
    Vec block{};
    for (int i = begin; i < std::min(begin + BLOCK, padded(size)); i += LANES) {
      const Vec weight = exponential(load(z + i) - made.top);
      store(weights + i, weight);
      block += weight;
    }
    made.total += sum(block);
    scratch.block_sums[made.blocks] = made.total;
  }
  return made;
}

// The first token at which the cumulative sum of `scratch.weights` exceeds `uniform` times their sum.
int invert(int size, int blocks, double total, double uniform, const Scratch& scratch) {
  const float* weights = scratch.weights.data();
  const double* sums = scratch.block_sums.data();
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
  return drawn;
}

// Replace the weights p in `scratch` by max(p - q, 0), where q has the given logits. Returns their sum, 0 if rounding
// leaves nothing, or -1 if the logits are not finite. Overwrites the logits.
double subtract(float* own_logits, int size, float temperature, const Weights& p, Scratch& scratch) {
  Array<float> here(padded(size));
  std::copy_n(scratch.weights.data(), padded(size), here.data());
  const Weights q = weigh(own_logits, size, temperature, scratch);
  if (!q.finite) return -1;
  float* weights = scratch.weights.data();
  double total = 0;
  for (int begin = 0, block = 0; begin < size; begin += BLOCK, block++) {
    for (int i = begin; i < std::min(begin + BLOCK, size); i++) {
      weights[i] = static_cast<float>(std::max(0.0, here[i] / p.total - weights[i] / q.total));
      total += weights[i];
    }
    scratch.block_sums[block] = total;
  }
  return total;
}

}  // namespace

int draw(float* z, int size, double uniform, float temperature, float* logprob, Scratch& scratch) {
  if (temperature == 0) {
    float top;
    if (!scale(z, size, temperature, &top)) return -1;
    *logprob = 0;
    return static_cast<int>(std::find(z, z + size, top) - z);
  }
  const Weights p = weigh(z, size, temperature, scratch);
  if (!p.finite) return -1;
  const int drawn = invert(size, p.blocks, p.total, uniform, scratch);
  *logprob = p.logprob(z[drawn]);
  return drawn;
}

int draw_with_draft(float* z, int size, double uniform, float temperature, const DraftToken& draft, float* logprob,
                    bool* taken, Scratch& scratch) {
  if (temperature == 0) {
    const int drawn = draw(z, size, uniform, temperature, logprob, scratch);
    *taken = drawn == draft.token;
    return drawn;
  }
  const Weights p = weigh(z, size, temperature, scratch);
  if (!p.finite) return -1;
  *logprob = p.logprob(z[draft.token]);
  const double share = std::min(1.0, std::exp(static_cast<double>(*logprob) - draft.logprob));
  *taken = uniform < share;
  if (*taken) return draft.token;
  Array<float> own(padded(size));
  draft.own_logits(own.data());
  const double total = subtract(own.data(), size, temperature, p, scratch);
  if (total < 0) return -1;
  if (total == 0) {  // the distributions are equal except for rounding
    *taken = share > 0;
    return *taken ? draft.token : draw(z, size, uniform, 1, logprob, scratch);
  }
  const int drawn = invert(size, p.blocks, total, (uniform - share) / (1 - share), scratch);
  *logprob = p.logprob(z[drawn]);
  return drawn;
}

}  // namespace vineppo
