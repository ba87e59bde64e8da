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

Job::Job(const Model& model, std::vector<TrunkRequest> trunks,
         std::vector<SampleRequest> samples, std::vector<int> end_tokens, int threads, int batch, size_t memory)
    : model_(model),
      trunk_requests_(std::move(trunks)),
      samples_(std::move(samples)),
      end_tokens_(std::move(end_tokens)),
      batch_(batch),
      memory_(memory),
      results_(samples_.size()),
      trunks_(trunk_requests_.size()),
      index_on_trunk_(samples_.size()),
      asking_(samples_.size()),
      unfinished_(static_cast<int>(samples_.size())) {
  for (size_t t = 0; t < trunks_.size(); t++) {
    const std::vector<int>& on = trunk_requests_[t].samples;
    for (size_t i = 0; i < on.size(); i++) index_on_trunk_[on[i]] = static_cast<int>(i);
    trunks_[t].unfinished = static_cast<int>(on.size());
    trunks_[t].trunk_bytes = Cache::bytes(model.shape, static_cast<int>(trunk_requests_[t].tokens.size()));
    trunks_[t].branch_bytes = Cache::bytes(model.shape, most_new_tokens(static_cast<int>(t)));
    if (trunks_[t].trunk_bytes + trunks_[t].branch_bytes > memory_)
      throw std::invalid_argument("the keys and values of a sample do not fit into the memory");
  }
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

int Job::most_new_tokens(int trunk) const {
  int most = 1;
  for (int sample : trunk_requests_[trunk].samples) most = std::max(most, samples_[sample].budget);
  return most;
}

void Job::work() {
  try {
    Scratch scratch(model_.shape, std::max(batch_, PREFILL_ROWS));
    scratch.logits = Array<float>(static_cast<size_t>(batch_) * padded(model_.shape.vocabulary));
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
        if (static_cast<int>(live.size()) >= batch_ || next_trunk_ >= trunks_.size()) return;
        const Trunk& next = trunks_[next_trunk_];
        if (used_ + next.trunk_bytes + next.branch_bytes > memory_) return;
        used_ += next.trunk_bytes + next.branch_bytes;
        trunk = static_cast<int>(next_trunk_++);
      }
    }
    if (trunk < 0) {
      draw_first(fresh, live, scratch);
      continue;
    }
    prefill(trunk, scratch);
    std::lock_guard<std::mutex> lock(mutex_);
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

void Job::prefill(int index, Scratch& scratch) {
  const TrunkRequest& request = trunk_requests_[index];
  Trunk& trunk = trunks_[index];
  const int length = static_cast<int>(request.tokens.size()), stride = padded(model_.shape.hidden);
  trunk.cache = std::make_unique<Cache>(model_.shape, length);
  trunk.hidden = Array<float>(request.samples.size() * stride);
  std::vector<Row> rows;
  for (int begin = 0; begin < length && !cancelled_; begin += PREFILL_ROWS) {
    const int end = std::min(length, begin + PREFILL_ROWS);
    rows.clear();
    for (int p = begin; p < end; p++)
      rows.push_back({trunk.cache.get(), p + 1, nullptr, 0, trunk.cache.get(), p, p, request.tokens[p]});
    forward(model_, rows.data(), end - begin, scratch);
    for (size_t i = 0; i < request.samples.size(); i++) {
      const int last = samples_[request.samples[i]].prefix_length - 1;
      if (last < begin || last >= end) continue;
      const float* state = scratch.normed.data() + static_cast<size_t>(last - begin) * stride;
      std::copy(state, state + stride, trunk.hidden.data() + i * stride);
    }
  }
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
  logits(model_, scratch.normed.data(), static_cast<int>(fresh.size()), scratch.logits.data());
  for (size_t i = 0; i < fresh.size(); i++) {
    float* row = scratch.logits.data() + i * columns;
    for (int token : samples_[fresh[i].sample].excluded_first) row[token] = -INFINITY;
    draw(fresh[i], row, scratch, live);
  }
  fresh.clear();
}

// Compute the last token of all samples that a thread holds, and draw their next tokens.
void Job::step(std::vector<Live>& live, Scratch& scratch) {
  // Attention computes samples on the same trunk together if they stand beside each other.
  std::sort(live.begin(), live.end(), [&](const Live& a, const Live& b) {
    return std::make_pair(samples_[a.sample].trunk, a.sample) < std::make_pair(samples_[b.sample].trunk, b.sample);
  });
  std::vector<Row> rows;
  for (Live& one : live) {
    const SampleRequest& request = samples_[one.sample];
    const std::vector<int32_t>& tokens = results_[one.sample].tokens;
    const int count = static_cast<int>(tokens.size());
    if (!one.branch)
      one.branch = std::make_unique<Cache>(model_.shape, most_new_tokens(request.trunk));
    rows.push_back({trunks_[request.trunk].cache.get(), request.prefix_length, one.branch.get(), count,
                    one.branch.get(), count - 1, request.prefix_length + count - 1, tokens.back()});
  }
  const int columns = padded(model_.shape.vocabulary);
  forward(model_, rows.data(), static_cast<int>(rows.size()), scratch);
  logits(model_, scratch.normed.data(), static_cast<int>(rows.size()), scratch.logits.data());
  std::vector<Live> before;
  before.swap(live);
  for (size_t i = 0; i < before.size(); i++)
    draw(before[i], scratch.logits.data() + i * columns, scratch, live);
}

// Draw the next token of a sample. A sample that goes on is moved to `live`.
void Job::draw(Live& one, float* logits, Scratch& scratch, std::vector<Live>& live) {
  const SampleRequest& request = samples_[one.sample];
  Result& result = results_[one.sample];
  float logprob;
  const int token = vineppo::draw(logits, model_.shape.vocabulary, uniform(request.key, result.tokens.size()),
                                  request.temperature, &logprob, scratch);
  if (token < 0) throw std::runtime_error("the logits of the model are not finite, or all tokens are excluded");
  result.tokens.push_back(token);
  result.logprobs.push_back(logprob);
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
    live.push_back(std::move(one));
  }
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
