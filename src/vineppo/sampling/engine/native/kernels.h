// The computations of the engine.
#pragma once

#include <functional>

#include "model.h"

namespace vineppo {

// Copy a float32 matrix (rows x inner) to the rows from `offset` on of a packed matrix.
void pack(const float* source, int rows, int inner, Packed& target, int offset);

// Compute the keys and values of the rows of a batch, and their last hidden states after the final norm:
// `scratch.normed`, (count x padded hidden).
void forward(const Model& model, const Row* rows, int count, Scratch& scratch);

// Logits (count x padded vocabulary) of hidden states (count x padded hidden).
void logits(const Model& model, const float* hidden, int count, float* out, Scratch& scratch);

// Draw a token by inversion of the cumulative distribution: the first token at which the cumulative sum of the weights
// exceeds `uniform` times their sum. At temperature 0: the token with the largest logit, with log-probability 0.
// Returns -1 if the logits are not finite. Overwrites the logits (padded vocabulary).
int draw(float* logits, int vocabulary, double uniform, float temperature, float* logprob, Scratch& scratch);

// A token of a draft. `own_logits` computes the logits in the draft's own context (padded vocabulary).
struct DraftToken {
  int token;
  float logprob;  // in the draft's own context
  std::function<void(float*)> own_logits;
};

// Draw a token that is the draft's with the largest possible probability, and has the distribution of `draw`: the
// draft's token is taken if `uniform` is below a = min(1, p / q), or else a token is drawn from max(p - q, 0) with
// (uniform - a) / (1 - a). `taken`: whether it is the draft's token. Returns -1 as `draw`, and overwrites the logits.
int draw_with_draft(float* logits, int vocabulary, double uniform, float temperature, const DraftToken& draft,
                    float* logprob, bool* taken, Scratch& scratch);

}  // namespace vineppo
