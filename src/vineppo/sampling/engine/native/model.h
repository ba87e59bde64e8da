// The data of a model: shapes, packed weights, the keys and values of tokens, and memory for a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "numbers.h"

namespace vineppo {

// Memory for numbers, at addresses that are multiples of 64 bytes. Not initialised.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t size) : size_(size) {
    if (size == 0) return;
    data_ = static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  void fill(T value) {
    for (size_t i = 0; i < size_; i++) data_[i] = value;
  }

 private:
  void swap(Array& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

enum class Activation : int32_t { silu = 0, gelu_tanh = 1, gelu = 2 };

// Shape of a model. Python fills a structure of the same layout (library.py), so the order of the fields matters.
struct Shape {
  int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
  int32_t rope_tables;
  int32_t tied;  // the embedding is the output matrix
  Activation activation;
  float epsilon;            // of the RMS norms
  float attention_scale;    // factor of the scores
  float attention_softcap;  // 0: none
  float logit_softcap;      // 0: none
  float embedding_scale;    // factor of the embeddings

  int padded_head() const { return padded(head_dim); }        // columns of the values of a head
  int head_terms() const { return rounded_up(head_dim, TERMS); }  // terms of a score
  int query_columns() const { return heads * head_dim; }
  int qkv_columns() const { return (heads + 2 * kv_heads) * head_dim; }
};

// A matrix W of N x K in panels of 16 rows of W: entry (n, k) is at [n / 16][k / PAIR][n % 16][k % PAIR]
// (`packed_index`). Missing entries are 0.
struct Packed {
  Packed() = default;
  Packed(int columns, int terms)
      : columns(columns),
        terms(terms),
        inner(rounded_up(terms, TERMS)),
        values(static_cast<size_t>(panels()) * PANEL * inner) {
    values.fill(0);
  }

  int columns = 0, terms = 0;  // N and K
  int inner = 0;               // K rounded up to a multiple of TERMS
  Array<Number> values;
  Array<float> bias;  // N rounded up to a panel, or empty

  int panels() const { return padded(columns) / PANEL; }
};

struct Layer {
  Packed qkv, output, gate_up, down;
  // Weights of the norms; the ones that a model does not have are empty.
  Array<float> before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
  int rope_table = 0;
  int window = 0;  // number of positions that a token attends to, itself included; 0: all
};

struct Model {
  Shape shape;
  std::vector<Layer> layers;
  Array<float> embedding;  // vocabulary x hidden; empty if tied
  Packed head;
  Array<float> final_norm;
  int positions = 0;                         // number of positions in the tables of rotary positions
  std::vector<Array<float>> cosines, sines;  // positions x head_dim each
};

// Keys and values of the tokens at consecutive positions, for all layers and heads.
// The keys of a head are a packed matrix of (capacity x head_terms), its values one of (padded_head x capacity).
class Cache {
 public:
  Cache(const Shape& shape, int capacity)
      : capacity_(padded_positions(capacity)),
        head_keys_(static_cast<size_t>(capacity_) * shape.head_terms()),
        head_values_(static_cast<size_t>(capacity_) * shape.padded_head()),
        heads_(shape.kv_heads),
        keys_(head_keys_ * heads_ * shape.layers),
        values_(head_values_ * heads_ * shape.layers) {}

  int capacity() const { return capacity_; }
  Number* keys(int layer, int head) { return keys_.data() + index(layer, head) * head_keys_; }
  const Number* keys(int layer, int head) const { return keys_.data() + index(layer, head) * head_keys_; }
  Number* values(int layer, int head) { return values_.data() + index(layer, head) * head_values_; }
  const Number* values(int layer, int head) const { return values_.data() + index(layer, head) * head_values_; }

  static size_t bytes(const Shape& shape, int capacity) {
    return sizeof(Number) * padded_positions(capacity) *
           static_cast<size_t>(shape.head_terms() + shape.padded_head()) * shape.kv_heads * shape.layers;
  }

 private:
  size_t index(int layer, int head) const { return static_cast<size_t>(layer) * heads_ + head; }
  int capacity_;
  size_t head_keys_, head_values_;
  int heads_;
  Array<Number> keys_, values_;
};

// One token of a batch: it is computed at a position of its sequence, which is a trunk followed by a branch.
struct Row {
  const Cache* trunk;
  int trunk_length;  // the sequence begins with this many positions of the trunk
  Cache* branch;     // the positions after those of the trunk; may be null
  int branch_length;
  Cache* target;  // where the token's keys and values are stored: the trunk or the branch,
  int slot;       // at this index
  int position;   // of the token in the sequence
  int token;
};

// The weights of this many tokens are summed in float32 when a token is drawn. The sums of blocks are added in float64.
constexpr int BLOCK = 256;

// Memory of one thread for batches of at most `rows` rows.
struct Scratch {
  Array<float> residual, normed, qkv, attended, gate_up;  // one row per row of the batch
  Array<float> scores, mixed, sums;                       // for attention
  Array<Number> queries, narrow_scores;                   // for attention
  Array<float> logits, weights;
  Array<double> block_sums;

  Scratch(const Shape& s, int rows)
      : residual(static_cast<size_t>(rows) * padded(s.hidden)),
        normed(static_cast<size_t>(rows) * padded(s.hidden)),
        qkv(static_cast<size_t>(rows) * padded(s.qkv_columns())),
        attended(static_cast<size_t>(rows) * s.query_columns()),
        gate_up(static_cast<size_t>(rows) * padded(2 * s.intermediate) + PANEL),
        mixed(static_cast<size_t>(rows) * s.heads / s.kv_heads * s.padded_head()),
        sums(static_cast<size_t>(rows) * s.heads / s.kv_heads),
        queries((static_cast<size_t>(rows) * s.heads / s.kv_heads + SPARE_ROWS) * s.head_terms()),
        weights(padded(s.vocabulary)),
        block_sums((s.vocabulary + BLOCK - 1) / BLOCK) {}

  // Memory for the rows of a product in the numbers of the weights.
  Number* narrowed(int rows, size_t stride) { return grown(narrow_rows_, (rows + SPARE_ROWS) * stride); }
  // Make an array large enough, and return its numbers, which are undefined if it has grown.
  template <class T>
  static T* grown(Array<T>& array, size_t size) {
    if (array.size() < size) array = Array<T>(size);
    return array.data();
  }

 private:
  Array<Number> narrow_rows_;
};

}  // namespace vineppo
