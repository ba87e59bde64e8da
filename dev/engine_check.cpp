// A program that runs the engine on a random model, for the sanitizers of the compiler (make engine-sanitize).
//
// It samples with one thread and with three, with and without questions about stop strings, with and without drafts,
// within little memory, and cancels some jobs. All complete runs must give the same tokens and log-probabilities.
#include <algorithm>
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

// The tokens of a sample as a draft for others, in the own context or in another one.
Draft draft_from(const std::vector<TrunkRequest>& trunks, const Result& result, int trunk, int context_length,
                 int start) {
  const int most = static_cast<int>(trunks[trunk].tokens.size()) + 1 - context_length;
  const int size = std::min(most, static_cast<int>(result.tokens.size()));
  return {trunk, context_length, start, {result.tokens.begin(), result.tokens.begin() + size},
          {result.logprobs.begin(), result.logprobs.begin() + size}};
}

// Sample, and return the tokens of all samples; stop after `events` events. With `earlier` results, some samples have
// drafts, whose contexts are their own trunk, the next one, or a trunk without samples.
std::vector<Result> run(const Model& model, int threads, int batch, size_t memory, bool asks, int events,
                        const std::vector<Result>& earlier = {}) {
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
  std::vector<Draft> drafts;
  if (!earlier.empty()) {
    trunks.push_back({trunks.back().tokens, {}});
    for (size_t i = 0; i < samples.size(); i++) {
      if (i % 4 == 3) continue;
      const int t = i % 4 == 0 ? samples[i].trunk : i % 4 == 1 ? (samples[i].trunk + 1) % TRUNKS : TRUNKS;
      samples[i].draft = static_cast<int>(drafts.size());
      drafts.push_back(draft_from(trunks, earlier[(i + 6) % earlier.size()], t, 1 + static_cast<int>(i) % 3, i % 3));
    }
  }
  Job job(model, trunks, samples, drafts, {1}, threads, batch, memory);
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
    if (a[i].tokens != b[i].tokens || a[i].logprobs != b[i].logprobs || a[i].finish != b[i].finish ||
        a[i].accepted != b[i].accepted)
      throw std::runtime_error("two runs gave different results");
}

}  // namespace

int main() {
  const Model model = random_model();
  const std::vector<Result> expected = run(model, 1, 8, 1u << 30, false, 1 << 30);
  const size_t little = Cache::bytes(model.shape, 59) + Cache::bytes(model.shape, 31) + 1;
  const std::vector<Result> drafted = run(model, 1, 8, 1u << 30, false, 1 << 30, expected);
  int accepted = 0;
  for (const Result& result : drafted) accepted += result.accepted;
  if (accepted < 10) throw std::runtime_error("no draft was taken");
  const size_t more = little + Cache::bytes(model.shape, 59) + sizeof(float) * 8 * 64 * 48;
  for (int repeat = 0; repeat < 3; repeat++) {
    require_equal(drafted, run(model, 3, 8, 1u << 30, false, 1 << 30, expected));
    require_equal(drafted, run(model, 3, 3, more, false, 1 << 30, expected));
    require_equal(drafted, run(model, 3, 5, 1u << 30, true, 1 << 30, expected));
    run(model, 3, 8, 1u << 30, true, 20, expected);
    require_equal(expected, run(model, 3, 8, 1u << 30, false, 1 << 30));
    require_equal(expected, run(model, 3, 3, little, false, 1 << 30));
    require_equal(expected, run(model, 3, 5, 1u << 30, true, 1 << 30));
    run(model, 3, 8, 1u << 30, true, 20);
    run(model, 2, 2, little, false, 3);
  }
  std::puts("all runs gave the same results");
  return 0;
}
