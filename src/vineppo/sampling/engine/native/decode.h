// Sampling of many completions by several threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "drafts.h"
#include "model.h"

namespace vineppo {

// A trunk is a token sequence whose keys and values are computed once. The prefix of a sample consists of the first
// tokens of its trunk. A trunk without samples is the context of drafts.
struct TrunkRequest {
  std::vector<int> tokens;
  std::vector<int> samples;  // indices of the samples on it
};

struct SampleRequest {
  int trunk;
  int prefix_length;
  int budget;          // maximum number of new tokens
  uint64_t key;        // the random number of token t depends on this key and on t
  float temperature;
  std::vector<int> excluded_first;
  const uint8_t* asks;  // for each token id, whether it may complete a stop string; null: the sample has none
  int draft = -1;       // index of its draft, or -1
};

enum class EventKind : int32_t { finished = 0, question = 1 };

// What the caller is told about a sample. A question asks whether its last token completed a stop string. The sample
// waits for the answer.
struct Event {
  EventKind kind;
  int32_t sample;
};

enum class Finish : uint8_t { running = 0, stop = 1, length = 2 };

// The tokens of a sample.
struct Result {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  Finish finish = Finish::running;
  int accepted = 0;  // number of tokens that were taken from the draft
};

// One call of `sample`. The threads start in the constructor and end when all samples are finished or `cancel` is
// called. All other functions are for the thread that made the job.
//
// A thread holds the samples that it decodes, at most `batch`, and never waits for another thread while it holds any,
// with one exception: while another thread computes the hidden states that drafts on its next trunk need.
// It takes new samples as soon as there is room. A thread without work gets half of the samples of another thread.
class Job {
 public:
  Job(const Model& model, std::vector<TrunkRequest> trunks, std::vector<SampleRequest> samples,
      std::vector<Draft> drafts, std::vector<int> end_tokens, int threads, int batch, size_t memory);
  ~Job();

  // Wait until there are `least` events, all samples are finished, or the time is over, and take the events. Returns
  // false if all samples are finished and all events were taken. Throws what a thread threw.
  bool wait(int milliseconds, std::vector<Event>& events, size_t most, size_t least = 1);
  // Answer a question: whether the sample's last token completed a stop string.
  void answer(int sample, bool stops);
  void cancel();
  const Result& result(int sample) const { return results_[sample]; }

 private:
  // A sample that is being decoded. Its last token is not in its branch yet.
  struct Live {
    int sample;
    std::unique_ptr<Cache> branch;
  };
  // A trunk with its keys and values, while its samples are decoded.
  struct Trunk {
    std::unique_ptr<Cache> cache;
    Array<float> hidden;  // hidden states at the ends of the prefixes of its samples, (samples, padded hidden)
    std::vector<int> contexts;  // trunks whose hidden states the drafts of its samples need
    size_t trunk_bytes = 0, branch_bytes = 0;  // with the hidden states of `contexts`
    size_t passing_bytes = 0;                  // more while `contexts` are computed
    int unfinished = 0;
    int branches = 0;  // of its samples
  };

  void work();
  void take_work(std::vector<Live>& live, Scratch& scratch);
  bool take_fresh(std::vector<Live>& taken);
  void prepare_trunk(int trunk);
  void prepare_contexts();
  void prefill(int trunk, Scratch& scratch);
  template <class Seen>
  void compute(const std::vector<int>& tokens, int length, Cache& cache, Scratch& scratch, Seen seen);
  void compute_states(int trunk, Scratch& scratch);
  void draw_first(std::vector<Live>& fresh, std::vector<Live>& live, Scratch& scratch);
  void step(std::vector<Live>& live, Scratch& scratch);
  int pending(int sample) const;
  void add_rows(Live& one, int drafted, std::vector<Row>& rows);
  void draw(Live& one, float* logits, int rows, Scratch& scratch, std::vector<Live>& live);
  bool draw_token(int sample, float* logits, Scratch& scratch);
  bool goes_on(Live& one);
  void finish(int sample, Finish how);
  void share(std::vector<Live>& live);
  int most_new_tokens(int trunk) const;

  const Model& model_;
  std::vector<TrunkRequest> trunk_requests_;
  std::vector<SampleRequest> samples_;
  std::vector<Draft> drafts_;
  std::vector<int> end_tokens_;
  int batch_;
  int rows_;  // maximum number of rows of a step: more than `batch_` with drafts
  size_t memory_;

  std::vector<Result> results_;
  std::vector<Trunk> trunks_;
  std::vector<DraftStates> states_;  // of each trunk
  std::vector<int> index_on_trunk_;  // of each sample

  std::mutex mutex_;
  std::condition_variable work_;    // there is something to do for a thread
  std::condition_variable news_;    // there is something to tell the caller
  size_t next_trunk_ = 0;
  size_t used_ = 0;                 // bytes of keys and values, with one branch of every trunk in use
  std::deque<int> fresh_;           // samples without a token whose trunk is computed
  std::deque<Live> resting_;        // samples with tokens that no thread holds
  std::vector<std::unique_ptr<Live>> asking_;  // by sample: those that wait for an answer
  std::deque<Event> events_;
  size_t awaited_ = 1;              // the number of events for which the caller is woken
  int unfinished_ = 0;
  int idle_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> cancelled_{false};
  std::vector<std::thread> pool_;
};

}  // namespace vineppo
