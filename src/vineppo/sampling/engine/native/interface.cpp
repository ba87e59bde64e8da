// The C interface, which Python calls through ctypes (library.py). No exception leaves a function: a function that fails
// returns a null pointer or -1, and `vineppo_error` returns the message of the last failure in this thread.
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "decode.h"
#include "kernels.h"
#include "model.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace vineppo;

thread_local std::string last_error;

template <class Function>
auto guarded(decltype(std::declval<Function>()()) failure, Function function) noexcept {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    last_error = "not enough memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return failure;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Array<float> copied(const float* source, size_t size) {
  Array<float> made(size);
  std::copy(source, source + size, made.data());
  return made;
}

// Where a matrix of the model is stored: the packed matrix and the first of its rows.
struct Place {
  Packed* matrix;
  int offset, rows;
};

// The matrices of a layer by number, in the order of `MATRICES` in library.py; the output matrix for layer -1.
Place place_of(Model& model, int layer, int matrix) {
  const Shape& s = model.shape;
  if (layer < 0) return {&model.head, 0, s.vocabulary};
  Layer& l = model.layers.at(layer);
  const int keys = s.kv_heads * s.head_dim;
  switch (matrix) {
    case 0: return {&l.qkv, 0, s.query_columns()};
    case 1: return {&l.qkv, s.query_columns(), keys};
    case 2: return {&l.qkv, s.query_columns() + keys, keys};
    case 3: return {&l.output, 0, s.hidden};
    case 4: return {&l.gate_up, 0, s.intermediate};
    case 5: return {&l.gate_up, s.intermediate, s.intermediate};
    case 6: return {&l.down, 0, s.hidden};
  }
  throw std::invalid_argument("unknown matrix");
}

// The norms of a layer by number, in the order of `NORMS` in library.py; the final norm for layer -1.
std::pair<Array<float>*, int> norm_of(Model& model, int layer, int norm) {
  const Shape& s = model.shape;
  if (layer < 0) return {&model.final_norm, s.hidden};
  Layer& l = model.layers.at(layer);
  switch (norm) {
    case 0: return {&l.before_attention, s.hidden};
    case 1: return {&l.after_attention, s.hidden};
    case 2: return {&l.before_mlp, s.hidden};
    case 3: return {&l.after_mlp, s.hidden};
    case 4: return {&l.query_norm, s.head_dim};
    case 5: return {&l.key_norm, s.head_dim};
  }
  throw std::invalid_argument("unknown norm");
}

#if defined(__x86_64__)

// A bit of the result of the instruction `cpuid` for leaf 7: features that GCC 12 has no names for.
bool has_feature(unsigned subleaf, int result, int bit) {
  unsigned registers[4] = {};  // eax, ebx, ecx, edx
  __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
  return (registers[result] >> bit) & 1;
}

// Whether the processor multiplies tiles of bfloat16 numbers, and Linux lets this process use the tile registers. Linux
// has to be asked once.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  const bool amx_bf16 = has_feature(0, 3, 22), amx_tile = has_feature(0, 3, 24);
  return amx_bf16 && amx_tile && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

#endif

// Drafts. Draft d has the tokens [token_starts[d], token_starts[d + 1]). Python fills a structure of the same layout.
struct DraftTable {
  int32_t count;
  const int32_t* trunks;           // for each draft, the trunk with its own context,
  const int32_t* context_lengths;  // the number of tokens before it there,
  const int32_t* starts;           // and its position in the completion
  const int32_t* token_starts;
  const int32_t* tokens;
  const float* logprobs;
  const int32_t* draft_of;  // for each sample, its draft or -1
};

std::vector<Draft> drafts_from(const DraftTable& table, const std::vector<TrunkRequest>& trunks, const Model& model) {
  std::vector<Draft> drafts(table.count);
  for (int d = 0; d < table.count; d++) {
    Draft& draft = drafts[d];
    const int first = table.token_starts[d], last = table.token_starts[d + 1];
    draft.trunk = table.trunks[d];
    draft.context_length = table.context_lengths[d];
    draft.start = table.starts[d];
    draft.tokens.assign(table.tokens + first, table.tokens + last);
    draft.logprobs.assign(table.logprobs + first, table.logprobs + last);
    require(draft.trunk >= 0 && draft.trunk < static_cast<int>(trunks.size()), "a draft has an unknown trunk");
    const int length = draft.context_length + draft.size() - 1;
    require(draft.size() > 0 && draft.start >= 0 && draft.context_length > 0 &&
                length <= static_cast<int>(trunks[draft.trunk].tokens.size()) && length <= model.positions,
            "a draft has an impossible length");
    for (int token : draft.tokens)
      require(token >= 0 && token < model.shape.vocabulary, "a token id of a draft is not in the vocabulary");
  }
  return drafts;
}

}  // namespace

EXPORT const char* vineppo_error() { return last_error.c_str(); }

// Whether this processor has the instructions of a library that is compiled for the given instruction set.
EXPORT int vineppo_can_run(const char* instructions) {
  const std::string name = instructions;
  if (name == "generic") return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2") return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (name == "avx512") return avx512;
  const bool bf16 = avx512 && has_feature(1, 0, 5);
  if (name == "avx512_bf16") return bf16;
  if (name == "amx_bf16") return bf16 && tiles_permitted();
#endif
  return 0;
}

EXPORT Model* vineppo_model_new(const Shape* shape) {
  return guarded(static_cast<Model*>(nullptr), [&] {
    auto made = std::make_unique<Model>();
    Model& model = *made;
    const Shape& s = model.shape = *shape;
    require(s.layers > 0 && s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.head_dim > 0 && s.intermediate > 0 &&
                s.vocabulary > 0 && s.heads % s.kv_heads == 0 && s.head_dim % 2 == 0,
            "impossible shape of a model");
    model.layers.resize(s.layers);
    for (Layer& layer : model.layers) {
      layer.qkv = Packed(s.qkv_columns(), s.hidden);
      layer.output = Packed(s.hidden, s.query_columns());
      layer.gate_up = Packed(2 * s.intermediate, s.hidden);
      layer.down = Packed(s.hidden, s.intermediate);
    }
    model.head = Packed(s.vocabulary, s.hidden);
    model.cosines.resize(s.rope_tables);
    model.sines.resize(s.rope_tables);
    return made.release();
  });
}

// The number of bytes of the keys and values of a sequence.
EXPORT int64_t vineppo_kv_bytes(Model* model, int tokens) {
  return static_cast<int64_t>(Cache::bytes(model->shape, tokens));
}

EXPORT void vineppo_model_free(Model* model) { delete model; }

// Set a matrix from float32 numbers (rows x inner), and its bias, or null for none.
EXPORT int vineppo_set_matrix(Model* model, int layer, int matrix, const float* values, int rows, int inner,
                              const float* bias) {
  return guarded(-1, [&] {
    const Place place = place_of(*model, layer, matrix);
    require(rows == place.rows && inner == place.matrix->terms, "a matrix has an unexpected shape");
    pack(values, rows, inner, *place.matrix, place.offset);
    if (bias != nullptr) {
      if (place.matrix->bias.empty()) {
        place.matrix->bias = Array<float>(padded(place.matrix->columns));
        place.matrix->bias.fill(0);
      }
      std::copy(bias, bias + rows, place.matrix->bias.data() + place.offset);
    }
    return 0;
  });
}

EXPORT int vineppo_set_norm(Model* model, int layer, int norm, const float* values, int size) {
  return guarded(-1, [&] {
    const auto [target, expected] = norm_of(*model, layer, norm);
    require(size == expected, "a norm has an unexpected size");
    *target = copied(values, size);
    return 0;
  });
}

EXPORT int vineppo_set_embedding(Model* model, const float* values, int rows, int columns) {
  return guarded(-1, [&] {
    require(rows == model->shape.vocabulary && columns == model->shape.hidden, "the embedding has an unexpected shape");
    const Shape& s = model->shape;
    model->embedding = copied(values, static_cast<size_t>(s.vocabulary) * s.hidden);
    return 0;
  });
}

// Set a table of rotary positions: cosines and sines (positions x head_dim). All tables must have the same number of
// positions.
EXPORT int vineppo_set_rope(Model* model, int table, int positions, const float* cosines, const float* sines) {
  return guarded(-1, [&] {
    const size_t size = static_cast<size_t>(positions) * model->shape.head_dim;
    model->cosines.at(table) = copied(cosines, size);
    model->sines.at(table) = copied(sines, size);
    model->positions = positions;
    return 0;
  });
}

EXPORT int vineppo_set_layer(Model* model, int layer, int rope_table, int window) {
  return guarded(-1, [&] {
    require(rope_table >= 0 && rope_table < model->shape.rope_tables, "unknown table of positions");
    model->layers.at(layer).rope_table = rope_table;
    model->layers.at(layer).window = window;
    return 0;
  });
}

// Logits (count x vocabulary) after every token of a sequence.
EXPORT int vineppo_logits(Model* model, const int32_t* tokens, int count, float* out) {
  return guarded(-1, [&] {
    const Shape& s = model->shape;
    require(count <= model->positions, "a sequence is longer than the tables of positions");
    const int columns = padded(s.vocabulary);
    Scratch scratch(s, 16);
    scratch.logits = Array<float>(static_cast<size_t>(16) * columns);
    Cache cache(s, count);
    for (int begin = 0; begin < count; begin += 16) {
      const int end = std::min(count, begin + 16);
      std::vector<Row> rows;
      for (int p = begin; p < end; p++) {
        require(tokens[p] >= 0 && tokens[p] < s.vocabulary, "a token id is not in the vocabulary");
        rows.push_back({&cache, p + 1, nullptr, 0, &cache, p, p, tokens[p]});
      }
      forward(*model, rows.data(), end - begin, scratch);
      logits(*model, scratch.normed.data(), end - begin, scratch.logits.data(), scratch);
      for (int p = begin; p < end; p++)
        std::copy_n(scratch.logits.data() + static_cast<size_t>(p - begin) * columns, s.vocabulary,
                    out + static_cast<size_t>(p) * s.vocabulary);
    }
    return 0;
  });
}

// Start sampling. Trunk t has the tokens [trunk_starts[t], trunk_starts[t + 1]). The samples are in the order of their
// trunks. Sample i has the excluded tokens [excluded_starts[i], excluded_starts[i + 1]). `asks` has one byte per token id
// for every kind of stop strings; `ask_kind` is -1 for a sample without stop strings. It must stay in memory.
// `drafts` may be null.
EXPORT Job* vineppo_job_new(Model* model, int trunks, const int32_t* trunk_starts, const int32_t* tokens, int samples,
                            const int32_t* trunk_of, const int32_t* prefix_lengths, const int32_t* budgets,
                            const uint64_t* keys, const float* temperatures, const int32_t* excluded_starts,
                            const int32_t* excluded, const int32_t* ask_kinds, const uint8_t* asks,
                            const int32_t* end_tokens, int ends, int threads, int batch, uint64_t memory,
                            const DraftTable* drafts) {
  return guarded(static_cast<Job*>(nullptr), [&] {
    const Shape& s = model->shape;
    auto known = [&](int token) { return token >= 0 && token < s.vocabulary; };
    std::vector<TrunkRequest> trunk_requests(trunks);
    for (int t = 0; t < trunks; t++) {
      trunk_requests[t].tokens.assign(tokens + trunk_starts[t], tokens + trunk_starts[t + 1]);
      for (int token : trunk_requests[t].tokens) require(known(token), "a token id is not in the vocabulary");
    }
    std::vector<SampleRequest> requests(samples);
    for (int i = 0; i < samples; i++) {
      require(trunk_of[i] >= 0 && trunk_of[i] < trunks, "a sample has an unknown trunk");
      TrunkRequest& trunk = trunk_requests[trunk_of[i]];
      require(prefix_lengths[i] >= 1 && prefix_lengths[i] <= static_cast<int>(trunk.tokens.size()) && budgets[i] >= 1,
              "a sample has an impossible length");
      require(prefix_lengths[i] + budgets[i] - 1 <= model->positions, "a sample is longer than the model allows");
      trunk.samples.push_back(i);
      requests[i] = {trunk_of[i], prefix_lengths[i], budgets[i], keys[i], temperatures[i],
                     std::vector<int>(excluded + excluded_starts[i], excluded + excluded_starts[i + 1]),
                     ask_kinds[i] < 0 ? nullptr : asks + static_cast<size_t>(ask_kinds[i]) * s.vocabulary};
      for (int token : requests[i].excluded_first) require(known(token), "an excluded token is not in the vocabulary");
    }
    std::vector<Draft> made;
    if (drafts != nullptr) {
      made = drafts_from(*drafts, trunk_requests, *model);
      for (int i = 0; i < samples; i++) {
        requests[i].draft = drafts->draft_of[i];
        require(requests[i].draft >= -1 && requests[i].draft < drafts->count, "a sample has an unknown draft");
      }
    }
    require(threads >= 1 && batch >= 1, "at least one thread and one row are needed");
    return new Job(*model, std::move(trunk_requests), std::move(requests), std::move(made),
                   std::vector<int>(end_tokens, end_tokens + ends), threads, batch, memory);
  });
}

// Wait for at least `least` events, but not longer than the time, and write pairs (kind, sample), at most `most`.
// Returns their number, -2 if the job is over, -1 if it failed.
EXPORT int vineppo_job_wait(Job* job, int milliseconds, int32_t* pairs, int most, int least) {
  return guarded(-1, [&] {
    std::vector<Event> events;
    if (!job->wait(milliseconds, events, most, least)) return -2;
    for (size_t i = 0; i < events.size(); i++) {
      pairs[2 * i] = static_cast<int32_t>(events[i].kind);
      pairs[2 * i + 1] = events[i].sample;
    }
    return static_cast<int>(events.size());
  });
}

EXPORT int vineppo_job_answer(Job* job, int sample, int stops) {
  return guarded(-1, [&] {
    job->answer(sample, stops != 0);
    return 0;
  });
}

// The tokens of a sample that has finished or asked: their number, and pointers that are valid until the job ends or
// goes on with the sample. `accepted`: how many of them were taken from the draft.
EXPORT int vineppo_job_result(Job* job, int sample, const int32_t** tokens, const float** logprobs, int* finish,
                              int* accepted) {
  const Result& result = job->result(sample);
  *tokens = result.tokens.data();
  *logprobs = result.logprobs.data();
  *finish = static_cast<int>(result.finish);
  *accepted = result.accepted;
  return static_cast<int>(result.tokens.size());
}

// Stop the job's threads, and free it. Waits for a step to end.
EXPORT void vineppo_job_free(Job* job) { delete job; }
