// Drafts: tokens that were sampled in another context, which a sample takes as long as chance allows it.
//
// A sample with a draft computes its last token and the next tokens of the draft in one batch. The logits of each row
// decide whether the sample takes the next token of the draft. In place of the first token that it does not take, one is
// drawn from max(p - q, 0): p is the distribution here, q the one in the draft's own context. The hidden states of that
// context are kept for q.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "model.h"

namespace vineppo {

struct Draft {
  int trunk;           // begins with the draft's own context and the draft, except for the draft's last token
  int context_length;  // number of tokens before the draft in its own context
  int start;           // position in the completion of the draft's first token
  std::vector<int> tokens;
  std::vector<float> logprobs;  // of the tokens in the draft's own context

  int size() const { return static_cast<int>(tokens.size()); }
};

// Hidden states of a trunk at the positions behind which tokens of drafts stand: [begin, end). They are computed when a
// trunk whose samples need them is computed, and freed when the last of these trunks is finished.
struct DraftStates {
  int begin = 0, end = 0;
  int holders = 0;       // trunks in use that need the states
  std::mutex computing;  // held by the thread that computes the states
  bool ready = false;
  Array<float> hidden;  // (end - begin, padded hidden)

  bool needed() const { return begin < end; }
  void include(int first, int last) {
    begin = needed() ? std::min(begin, first) : first;
    end = std::max(end, last);
  }
  // Keep the states (end - begin, stride) of the positions [first, last) that are needed.
  void store(int first, int last, const float* states, int stride) {
    for (int p = std::max(first, begin); p < std::min(last, end); p++)
      std::copy_n(states + static_cast<size_t>(p - first) * stride, stride,
                  hidden.data() + static_cast<size_t>(p - begin) * stride);
  }
  void clear() {
    hidden = Array<float>();
    ready = false;
  }
  size_t bytes(const Shape& shape) const { return sizeof(float) * (end - begin) * padded(shape.hidden); }
};

}  // namespace vineppo
