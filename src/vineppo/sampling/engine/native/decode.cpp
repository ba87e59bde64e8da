#include "decode.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <system_error>

#include "kernels.h"

namespace vineppo {
namespace {

constexpr int PREFILL_ROWS = 48;  // positions of a trunk that are computed together
constexpr int DRAFT_ROWS = 16;    // tokens of a draft that are computed together for a sample
constexpr size_t LEAST_TO_SHARE = 4;

uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64 (Steele et al. 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The random number in [0, 1) for a key and a position, as `uniforms` in seeds.py.
double uniform(uint64_t key, uint64_t position) {
  return static_cast<double>(mix(key + (position + 1) * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

}  // namespace

Job::Job(const Model& model, std::vector<TrunkRequest> trunks, std::vector<SampleRequest> samples,
         std::vector<Draft> drafts, std::vector<int> end_tokens, int threads, int batch, size_t memory)
    : model_(model),
      trunk_requests_(std::move(trunks)),
      samples_(std::move(samples)),
      drafts_(std::move(drafts)),
      end_tokens_(std::move(end_tokens)),
      batch_(batch),
      rows_(drafts_.empty() ? batch : std::max(batch, PREFILL_ROWS)),
      memory_(memory),
      results_(samples_.size()),
      trunks_(trunk_requests_.size()),
      states_(trunk_requests_.size()),
      index_on_trunk_(samples_.size()),
      asking_(samples_.size()),
      unfinished_(static_cast<int>(samples_.size())) {
  prepare_contexts();
  for (size_t t = 0; t < trunks_.size(); t++) prepare_trunk(static_cast<int>(t));
  // A system may refuse a thread. The others then do the work.
  try {
    for (int i = 0; i < std::min(threads, static_cast<int>(samples_.size())); i++) pool_.emplace_back(&Job::work, this);
  } catch (const std::system_error&) {
    if (pool_.empty()) throw;
  }
}

Job::~Job() {
  cancel();
  for (std::thread& thread : pool_) thread.join();
}

void Job::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  work_.notify_all();
  news_.notify_all();
}

bool Job::wait(int milliseconds, std::vector<Event>& events, size_t most, size_t least) {
  std::unique_lock<std::mutex> lock(mutex_);
  awaited_ = least;
  news_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                 [&] { return events_.size() >= awaited_ || unfinished_ == 0 || error_ || cancelled_; });
  if (error_) std::rethrow_exception(error_);
  for (events.clear(); !events_.empty() && events.size() < most; events_.pop_front()) events.push_back(events_.front());
  return !events.empty() || unfinished_ > 0;
}

void Job::answer(int sample, bool stops) {
  std::unique_ptr<Live> one;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sample < 0 || sample >= static_cast<int>(asking_.size()) || !asking_[sample])
      throw std::invalid_argument("an answer to a sample that did not ask");
    one = std::move(asking_[sample]);
  }
  const bool full = static_cast<int>(results_[sample].tokens.size()) >= samples_[sample].budget;
  if (stops || full) {
    one.reset();
    return finish(sample, stops ? Finish::stop : Finish::length);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  resting_.push_back(std::move(*one));
  work_.notify_one();
}

// Find the positions of every trunk whose hidden states drafts need, and the trunks that every trunk needs.
void Job::prepare_contexts() {
  for (const Draft& draft : drafts_)
    states_[draft.trunk].include(draft.context_length - 1, draft.context_length - 1 + draft.size());
  for (size_t t = 0; t < trunks_.size(); t++) {
    std::vector<int>& contexts = trunks_[t].contexts;
    // A trunk with samples keeps its own states for others, because it is computed in any case.
    if (states_[t].needed()) contexts.push_back(static_cast<int>(t));
    for (int sample : trunk_requests_[t].samples)
      if (samples_[sample].draft >= 0) contexts.push_back(drafts_[samples_[sample].draft].trunk);
    std::sort(contexts.begin(), contexts.end());
    contexts.erase(std::unique(contexts.begin(), contexts.end()), contexts.end());
  }
}

void Job::prepare_trunk(int index) {
  Trunk& trunk = trunks_[index];
  const TrunkRequest& request = trunk_requests_[index];
  if (request.samples.empty()) return;
  for (size_t i = 0; i < request.samples.size(); i++) index_on_trunk_[request.samples[i]] = static_cast<int>(i);
  trunk.unfinished = static_cast<int>(request.samples.size());
  trunk.trunk_bytes = Cache::bytes(model_.shape, static_cast<int>(request.tokens.size()));
  trunk.branch_bytes = Cache::bytes(model_.shape, most_new_tokens(index));
  for (int context : trunk.contexts) {
    trunk.trunk_bytes += states_[context].bytes(model_.shape);
    if (context != index)
      trunk.passing_bytes = std::max(trunk.passing_bytes, Cache::bytes(model_.shape, states_[context].end));
  }
  if (trunk.trunk_bytes + trunk.branch_bytes + trunk.passing_bytes > memory_)
    throw std::invalid_argument("the keys and values of a sample do not fit into the memory");
}

int Job::most_new_tokens(int trunk) const {
  int most = 1;
  for (int sample : trunk_requests_[trunk].samples) most = std::max(most, samples_[sample].budget);
  return most;
}

void Job::work() {
  try {
    Scratch scratch(model_.shape, std::max(rows_, PREFILL_ROWS));
    scratch.logits = Array<float>(static_cast<size_t>(rows_) * padded(model_.shape.vocabulary));
    std::vector<Live> live;
    while (!cancelled_) {
      take_work(live, scratch);
      if (live.empty()) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (unfinished_ == 0) return;
        // Another thread computes a trunk, holds all samples, or holds memory; or the caller has to answer.
        idle_++;
        work_.wait_for(lock, std::chrono::milliseconds(20));
        idle_--;
        continue;
      }
      step(live, scratch);
      share(live);
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    cancelled_ = true;
    work_.notify_all();
    news_.notify_all();
  }
}

// Fill the batch of a thread. Samples that have begun come first, then samples on trunks that are computed, and then a
// trunk is computed.
void Job::take_work(std::vector<Live>& live, Scratch& scratch) {
  std::vector<Live> fresh;
  while (static_cast<int>(live.size()) < batch_ && !cancelled_) {
    int trunk = -1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(live.size()) < batch_ && !resting_.empty()) {
        live.push_back(std::move(resting_.front()));
        resting_.pop_front();
      }
      fresh.clear();
      while (static_cast<int>(live.size() + fresh.size()) < batch_ && take_fresh(fresh)) {
      }
      if (fresh.empty()) {
        while (next_trunk_ < trunks_.size() && trunk_requests_[next_trunk_].samples.empty()) next_trunk_++;
        if (static_cast<int>(live.size()) >= batch_ || next_trunk_ >= trunks_.size()) return;
        const Trunk& next = trunks_[next_trunk_];
        const size_t bytes = next.trunk_bytes + next.branch_bytes + next.passing_bytes;
        if (used_ + bytes > memory_) return;
        used_ += bytes;
        for (int context : next.contexts) states_[context].holders++;
        trunk = static_cast<int>(next_trunk_++);
      }
    }
    if (trunk < 0) {
      draw_first(fresh, live, scratch);
      continue;
    }
    prefill(trunk, scratch);
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= trunks_[trunk].passing_bytes;
    for (int sample : trunk_requests_[trunk].samples) fresh_.push_back(sample);
    work_.notify_all();
  }
}

// Take one sample without tokens, if there is one for which there is memory. The caller holds the mutex. One branch of
// every trunk is paid with the trunk, so the samples of a trunk can always be decoded one after another.
bool Job::take_fresh(std::vector<Live>& taken) {
  for (auto it = fresh_.begin(); it != fresh_.end(); ++it) {
    Trunk& trunk = trunks_[samples_[*it].trunk];
    if (trunk.branches > 0 && used_ + trunk.branch_bytes > memory_) continue;
    if (trunk.branches++ > 0) used_ += trunk.branch_bytes;
    taken.push_back({*it, nullptr});
    fresh_.erase(it);
    return true;
  }
  return false;
}

// Compute the keys and values of the first tokens of a trunk. `seen(begin, end, states)` is called with the hidden
// states of the positions [begin, end).
template <class Seen>
void Job::compute(const std::vector<int>& tokens, int length, Cache& cache, Scratch& scratch, Seen seen) {
  std::vector<Row> rows;
  for (int begin = 0; begin < length && !cancelled_; begin += PREFILL_ROWS) {
    const int end = std::min(length, begin + PREFILL_ROWS);
    rows.clear();
    for (int p = begin; p < end; p++) rows.push_back({&cache, p + 1, nullptr, 0, &cache, p, p, tokens[p]});
    forward(model_, rows.data(), end - begin, scratch);
    seen(begin, end, scratch.normed.data());
  }
}

// Compute a trunk, and the hidden states that the drafts of its samples need.
void Job::prefill(int index, Scratch& scratch) {
  const TrunkRequest& request = trunk_requests_[index];
  Trunk& trunk = trunks_[index];
  const int length = static_cast<int>(request.tokens.size()), stride = padded(model_.shape.hidden);
  trunk.cache = std::make_unique<Cache>(model_.shape, length);
  trunk.hidden = Array<float>(request.samples.size() * stride);
  DraftStates& own = states_[index];
  std::unique_lock<std::mutex> lock(own.computing, std::defer_lock);
  if (own.needed()) lock.lock();
  const bool keeps = own.needed() && !own.ready;
  if (keeps) own.hidden = Array<float>(static_cast<size_t>(own.end - own.begin) * stride);
  compute(request.tokens, length, *trunk.cache, scratch, [&](int begin, int end, const float* states) {
    for (size_t i = 0; i < request.samples.size(); i++) {
      const int last = samples_[request.samples[i]].prefix_length - 1;
      if (last < begin || last >= end) continue;
      const float* state = states + static_cast<size_t>(last - begin) * stride;
      std::copy(state, state + stride, trunk.hidden.data() + i * stride);
    }
    if (keeps) own.store(begin, end, states, stride);
  });
  if (keeps) own.ready = true;
  if (own.needed()) lock.unlock();
  for (int context : trunk.contexts)
    if (context != index) compute_states(context, scratch);
}

// Compute the hidden states of a trunk that drafts need, unless they are there.
void Job::compute_states(int index, Scratch& scratch) {
  DraftStates& states = states_[index];
  const int stride = padded(model_.shape.hidden);
  std::lock_guard<std::mutex> lock(states.computing);
  if (states.ready) return;
  states.hidden = Array<float>(static_cast<size_t>(states.end - states.begin) * stride);
  Cache cache(model_.shape, states.end);
  compute(trunk_requests_[index].tokens, states.end, cache, scratch,
          [&](int begin, int end, const float* rows) { states.store(begin, end, rows, stride); });
  states.ready = true;
}

// Draw the first token of samples.
void Job::draw_first(std::vector<Live>& fresh, std::vector<Live>& live, Scratch& scratch) {
  const int stride = padded(model_.shape.hidden), columns = padded(model_.shape.vocabulary);
  for (size_t i = 0; i < fresh.size(); i++) {
    const int sample = fresh[i].sample;
    const float* state =
        trunks_[samples_[sample].trunk].hidden.data() + static_cast<size_t>(index_on_trunk_[sample]) * stride;
    std::copy(state, state + stride, scratch.normed.data() + i * stride);
  }
  logits(model_, scratch.normed.data(), static_cast<int>(fresh.size()), scratch.logits.data(), scratch);
  for (size_t i = 0; i < fresh.size(); i++) {
    float* row = scratch.logits.data() + i * columns;
    for (int token : samples_[fresh[i].sample].excluded_first) row[token] = -INFINITY;
    draw(fresh[i], row, 1, scratch, live);
  }
  fresh.clear();
}

// Number of tokens of a sample's draft that may come next: 0 without a draft, before the draft begins, and behind a
// token that was not taken.
int Job::pending(int sample) const {
  const int index = samples_[sample].draft;
  if (index < 0) return 0;
  const Draft& draft = drafts_[index];
  const Result& result = results_[sample];
  return static_cast<int>(result.tokens.size()) == draft.start + result.accepted ? draft.size() - result.accepted : 0;
}

// Add the row of a sample's last token, and rows for the next `drafted` tokens of its draft.
void Job::add_rows(Live& one, int drafted, std::vector<Row>& rows) {
  const SampleRequest& request = samples_[one.sample];
  const Result& result = results_[one.sample];
  const int count = static_cast<int>(result.tokens.size());
  if (!one.branch) one.branch = std::make_unique<Cache>(model_.shape, most_new_tokens(request.trunk));
  const Cache* trunk = trunks_[request.trunk].cache.get();
  for (int i = 0; i <= drafted; i++) {
    const int token = i == 0 ? result.tokens.back() : drafts_[request.draft].tokens[result.accepted + i - 1];
    const int slot = count - 1 + i;
    rows.push_back({trunk, request.prefix_length, one.branch.get(), slot + 1, one.branch.get(), slot,
                    request.prefix_length + slot, token});
  }
}

// Compute the last token of all samples that a thread holds, and draw their next tokens. Free rows are used for the
// next tokens of drafts. If a sample takes one of them, the row behind it gives the token after it.
void Job::step(std::vector<Live>& live, Scratch& scratch) {
  // Attention computes samples on the same trunk together if they stand beside each other.
  std::sort(live.begin(), live.end(), [&](const Live& a, const Live& b) {
    return std::make_pair(samples_[a.sample].trunk, a.sample) < std::make_pair(samples_[b.sample].trunk, b.sample);
  });
  // The last token of a completion needs no row.
  auto wanted = [&](const Live& one) {
    const int left = samples_[one.sample].budget - static_cast<int>(results_[one.sample].tokens.size());
    return std::min({pending(one.sample), DRAFT_ROWS, left - 1});
  };
  int drafting = 0, spare = rows_ - static_cast<int>(live.size());
  for (const Live& one : live) drafting += wanted(one) > 0;
  std::vector<Row> rows;
  std::vector<int> ends;  // of the rows of each sample
  for (Live& one : live) {
    int drafted = wanted(one);
    if (drafted > 0) spare -= drafted = std::min(drafted, spare / drafting--);
    add_rows(one, drafted, rows);
    ends.push_back(static_cast<int>(rows.size()));
  }
  const size_t columns = padded(model_.shape.vocabulary);
  forward(model_, rows.data(), static_cast<int>(rows.size()), scratch);
  logits(model_, scratch.normed.data(), static_cast<int>(rows.size()), scratch.logits.data(), scratch);
  std::vector<Live> before;
  before.swap(live);
  for (size_t i = 0; i < before.size(); i++) {
    const int first = i ? ends[i - 1] : 0;
    draw(before[i], scratch.logits.data() + first * columns, ends[i] - first, scratch, live);
  }
}

// Draw the next tokens of a sample from the logits of its rows, as long as they are tokens of the draft. A sample that
// goes on is moved to `live`.
void Job::draw(Live& one, float* logits, int rows, Scratch& scratch, std::vector<Live>& live) {
  for (int row = 0; row < rows; row++, logits += padded(model_.shape.vocabulary)) {
    const bool taken = draw_token(one.sample, logits, scratch);
    if (!goes_on(one)) return;
    if (!taken) break;  // the next rows belong to another token
  }
  live.push_back(std::move(one));
}

// Draw the next token of a sample. Returns whether it was taken from the draft.
bool Job::draw_token(int sample, float* logits, Scratch& scratch) {
  const SampleRequest& request = samples_[sample];
  Result& result = results_[sample];
  const int size = model_.shape.vocabulary;
  const double number = uniform(request.key, result.tokens.size());
  float logprob = 0;
  int token;
  bool taken = false;
  if (pending(sample) > 0) {
    const Draft& draft = drafts_[request.draft];
    const DraftStates& states = states_[draft.trunk];
    const size_t row = draft.context_length - 1 + result.accepted - states.begin;
    const float* state = states.hidden.data() + row * padded(model_.shape.hidden);
    const DraftToken next{draft.tokens[result.accepted], draft.logprobs[result.accepted],
                          [&](float* out) { vineppo::logits(model_, state, 1, out, scratch); }};
    token = draw_with_draft(logits, size, number, request.temperature, next, &logprob, &taken, scratch);
  } else {
    token = vineppo::draw(logits, size, number, request.temperature, &logprob, scratch);
  }
  if (token < 0) throw std::runtime_error("the logits of the model are not finite, or all tokens are excluded");
  result.tokens.push_back(token);
  result.logprobs.push_back(logprob);
  result.accepted += taken;
  return taken;
}

// Whether a sample goes on behind its last token. Otherwise it is finished, or the caller is asked.
bool Job::goes_on(Live& one) {
  const SampleRequest& request = samples_[one.sample];
  const Result& result = results_[one.sample];
  const int token = result.tokens.back();
  if (std::find(end_tokens_.begin(), end_tokens_.end(), token) != end_tokens_.end()) {
    one.branch.reset();
    finish(one.sample, Finish::stop);
  } else if (request.asks && request.asks[token]) {
    const int sample = one.sample;
    std::lock_guard<std::mutex> lock(mutex_);
    asking_[sample] = std::make_unique<Live>(std::move(one));
    events_.push_back({EventKind::question, sample});
    if (events_.size() >= awaited_) news_.notify_one();
  } else if (static_cast<int>(result.tokens.size()) >= request.budget) {
    one.branch.reset();
    finish(one.sample, Finish::length);
  } else {
    return true;
  }
  return false;
}

void Job::finish(int sample, Finish how) {
  std::lock_guard<std::mutex> lock(mutex_);
  results_[sample].finish = how;
  Trunk& trunk = trunks_[samples_[sample].trunk];
  if (--trunk.branches > 0) used_ -= trunk.branch_bytes;
  if (--trunk.unfinished == 0) {
    trunk.cache.reset();
    trunk.hidden = Array<float>();
    used_ -= trunk.trunk_bytes + trunk.branch_bytes;
    for (int context : trunk.contexts)
      if (--states_[context].holders == 0) states_[context].clear();
  }
  unfinished_--;
  events_.push_back({EventKind::finished, sample});
  if (events_.size() >= awaited_ || unfinished_ == 0) news_.notify_one();
  if (unfinished_ == 0 || idle_ > 0) work_.notify_all();
}

// Give half of the samples of a thread to threads without work.
void Job::share(std::vector<Live>& live) {
  if (live.size() < LEAST_TO_SHARE) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (idle_ == 0 || !resting_.empty() || !fresh_.empty()) return;
  const size_t kept = (live.size() + 1) / 2;
  for (size_t i = kept; i < live.size(); i++) resting_.push_back(std::move(live[i]));
  live.erase(live.begin() + static_cast<std::ptrdiff_t>(kept), live.end());
  work_.notify_all();
}

}  // namespace vineppo
