// A program that runs the engine on a random model, for the sanitizers of the compiler (make engine-sanitize).
//
// It samples with one thread and with three, with and without questions about stop strings, within little memory, and
// cancels some jobs. All complete runs must give the same tokens and log-probabilities.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>

#include "decode.h"
#include "kernels.h"

using namespace vineppo;

namespace {

std::mt19937 generator(0);

Array<float> random_numbers(size_t size, float scale) {
  std::normal_distribution<float> normal(0, scale);
  Array<float> made(size);
  for (size_t i = 0; i < size; i++) made[i] = normal(generator);
  return made;
}

Packed random_matrix(int columns, int inner) {
  Packed matrix(columns, inner);
  const Array<float> values = random_numbers(static_cast<size_t>(columns) * inner, 0.2f);
  pack(values.data(), columns, inner, matrix, 0);
  return matrix;
}

Model random_model() {
  Model model;
  Shape& s = model.shape = Shape{2, 44, 4, 2, 22, 50, 61, 1, 1, Activation::silu, 1e-6f, 0.2f, 0, 0, 1};
  for (int l = 0; l < s.layers; l++) {
    Layer layer;
    layer.qkv = random_matrix(s.qkv_columns(), s.hidden);
    layer.output = random_matrix(s.hidden, s.query_columns());
    layer.gate_up = random_matrix(2 * s.intermediate, s.hidden);
    layer.down = random_matrix(s.hidden, s.intermediate);
    layer.before_attention = random_numbers(s.hidden, 1);
    layer.before_mlp = random_numbers(s.hidden, 1);
    layer.window = l ? 9 : 0;
    model.layers.push_back(std::move(layer));
  }
  model.head = random_matrix(s.vocabulary, s.hidden);
  model.final_norm = random_numbers(s.hidden, 1);
  model.positions = 128;
  model.cosines.push_back(random_numbers(static_cast<size_t>(model.positions) * s.head_dim, 1));
  model.sines.push_back(random_numbers(static_cast<size_t>(model.positions) * s.head_dim, 1));
  return model;
}

constexpr int TRUNKS = 9, SAMPLES = 7;

// Sample, and return the tokens of all samples; stop after `events` events.
std::vector<Result> run(const Model& model, int threads, int batch, size_t memory, bool asks, int events) {
  static const std::vector<uint8_t> every(model.shape.vocabulary, 1);
  std::vector<TrunkRequest> trunks(TRUNKS);
  std::vector<SampleRequest> samples;
  for (int t = 0; t < TRUNKS; t++) {
    for (int i = 0; i < 3 + 7 * t; i++) trunks[t].tokens.push_back((t * 31 + i * 7) % model.shape.vocabulary);
    for (int i = 0; i < SAMPLES; i++) {
      trunks[t].samples.push_back(static_cast<int>(samples.size()));
      samples.push_back({t, 1 + (t * i) % (3 + 7 * t), 1 + 5 * i, samples.size() * 7919u, 1.0f, {i}, asks ? every.data() : nullptr});
    }
  }
  Job job(model, trunks, samples, {1}, threads, batch, memory);
  std::vector<Event> news;
  while (events > 0 && job.wait(50, news, 16))
    for (const Event& event : news) {
      events--;
      if (event.kind == EventKind::question) job.answer(event.sample, false);
    }
  std::vector<Result> results;
  if (events > 0)
    for (size_t i = 0; i < samples.size(); i++) results.push_back(job.result(static_cast<int>(i)));
  return results;
}

void require_equal(const std::vector<Result>& a, const std::vector<Result>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (a[i].tokens != b[i].tokens || a[i].logprobs != b[i].logprobs || a[i].finish != b[i].finish)
      throw std::runtime_error("two runs gave different results");
}

}  // namespace

int main() {
  const Model model = random_model();
  const std::vector<Result> expected = run(model, 1, 8, 1u << 30, false, 1 << 30);
  const size_t little = Cache::bytes(model.shape, 59) + Cache::bytes(model.shape, 31) + 1;
  for (int repeat = 0; repeat < 3; repeat++) {
    require_equal(expected, run(model, 3, 8, 1u << 30, false, 1 << 30));
    require_equal(expected, run(model, 3, 3, little, false, 1 << 30));
    require_equal(expected, run(model, 3, 5, 1u << 30, true, 1 << 30));
    run(model, 3, 8, 1u << 30, true, 20);
    run(model, 2, 2, little, false, 3);
  }
  std::puts("all runs gave the same results");
  return 0;
}
