// A worker for tests of the scheduler (fake_machine.h).
//
// Keys are the token ids themselves. The worker seals them into the store's extents, forgets its
// tail when a sequence is opened anew, and draws each token from all tokens that the step's lanes
// and tail give it: a wrong run, a wrong sealed count or a forgotten block changes what is drawn.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_WORKER_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_WORKER_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/kv_layout.h"
#include "common/mutex.h"
#include "services/coordinator/worker_client.h"
#include "tests/unit/services/coordinator/fake_machine.h"

namespace headroom::coordinator {

// The worker's sequences and its step loop, on a thread of its own.
class FakeStepStream : public StepStream {
 public:
  FakeStepStream(std::shared_ptr<FakeMachine> machine,
                 std::function<void(v1::StepResponse)> on_response,
                 std::function<void(absl::Status)> on_closed)
      : machine_(std::move(machine)),
        on_response_(std::move(on_response)),
        on_closed_(std::move(on_closed)),
        thread_([this] { Loop(); }) {}

  ~FakeStepStream() override {
    {
      MutexLock lock(&mutex_);
      stop_ = true;
      sent_.SignalAll();
    }
    thread_.join();
  }

  void Send(v1::StepRequest step) override {
    if (step.abandon_sequence_ids_size() > 0) {
      MutexLock lock(&machine_->mutex);
      if (step.has_number()) Note(step, "abandons and has a number");
      abandoned_.insert(step.abandon_sequence_ids().begin(), step.abandon_sequence_ids().end());
      return;
    }
    std::map<uint64_t, int64_t> discarded;
    {
      MutexLock lock(&machine_->mutex);
      machine_->sent.push_back(step);
      discarded = discarded_;
    }
    MutexLock lock(&mutex_);
    if (++in_flight_[IsChunk(step)] > 2) machine_->Violation("three steps of a kind in flight");
    for (const v1::StepSequence& sequence : step.sequences()) {
      const auto at = discarded.find(sequence.sequence_id());
      if (at != discarded.end() && sequence.first_pos() <= at->second &&
          rows_in_flight_[sequence.sequence_id()] > 0) {
        machine_->Violation("sent anew before all steps of the sequence have returned");
      }
    }
    // The kinds run side by side: a close would pass a step of the other kind.
    for (const uint64_t id : step.close_sequence_ids()) {
      if (rows_in_flight_[id] > 0) machine_->Violation("closes a sequence with a step in flight");
    }
    for (const v1::StepSequence& sequence : step.sequences()) {
      ++rows_in_flight_[sequence.sequence_id()];
    }
    queue_.push_back(std::move(step));
    sent_.Signal();
  }

 private:
  struct Open {
    std::vector<v1::ExtentRun> runs;
    int64_t sealed_tokens = 0;
    std::map<int64_t, int32_t> tail;  // position -> key
    int32_t last_drawn = -1;

    int64_t capacity() const {
      return runs.empty() ? 0 : runs.back().first_pos() + runs.back().capacity_tokens();
    }
  };

  static bool IsChunk(const v1::StepRequest& step) {
    for (const v1::StepSequence& sequence : step.sequences()) {
      if (sequence.token_ids_size() > 1) return true;
    }
    return false;
  }

  void Loop() {
    for (;;) {
      v1::StepRequest step;
      {
        MutexLock lock(&mutex_);
        while (queue_.empty() && !stop_) sent_.WaitFor(&mutex_, absl::Seconds(1));
        if (stop_) break;
        step = std::move(queue_.front());
        queue_.pop_front();
      }
      absl::Duration step_time;
      bool waits = false;
      int code = 0;
      bool discard = false;
      {
        MutexLock lock(&machine_->mutex);
        const int64_t count = ++machine_->steps;
        step_time = machine_->step_time;
        waits = count <= machine_->steps_that_wait;
        if (machine_->worker_away || machine_->break_at_steps.count(count) > 0) break;
        const auto failure = machine_->fail_steps.find(count);
        if (failure != machine_->fail_steps.end()) code = failure->second;
        discard = machine_->discard_steps.count(count) > 0;
      }
      if (step_time > absl::ZeroDuration()) absl::SleepFor(step_time);
      if (waits) {
        MutexLock lock(&mutex_);
        while (queue_.empty() && !stop_) sent_.WaitFor(&mutex_, absl::Seconds(1));
      }
      v1::StepResponse response = Run(step, discard);
      if (code != 0) {
        response.clear_results();
        response.set_code(code);
        response.set_message("a failure that was asked for");
      }
      {
        MutexLock lock(&mutex_);
        --in_flight_[IsChunk(step)];
        for (const v1::StepSequence& sequence : step.sequences()) {
          --rows_in_flight_[sequence.sequence_id()];
        }
      }
      on_response_(std::move(response));
    }
    on_closed_(absl::UnavailableError("the fake worker is gone"));
  }

  // `discard`: what its lanes in place were to bring did not come.
  v1::StepResponse Run(const v1::StepRequest& step, bool discard) {
    v1::StepResponse response;
    response.set_number(step.number());
    response.set_attempt(step.attempt());
    response.set_code(0);
    MutexLock lock(&machine_->mutex);
    if (step.number() != last_number_ + 1 && last_number_ != 0) Note(step, "numbers do not follow");
    last_number_ = step.number();
    if (!step.sequences().empty() && !PlanKnown(step.plan_version())) {
      Note(step, "names a plan that was not prepared");
    }
    for (const uint64_t id : step.close_sequence_ids()) {
      if (open_.erase(id) == 0) Note(step, "closes what is not open");
      abandoned_.erase(id);
    }
    for (const v1::OpenSequence& open : step.open_sequences()) {
      Open& sequence = open_[open.sequence_id()];
      sequence = Open();
      for (const v1::ExtentRun& run : open.runs()) AddRun(step, sequence, run);
      sequence.sealed_tokens = open.sealed_tokens();
      if (open.sealed_tokens() % kBlockTokens != 0 || open.sealed_tokens() > sequence.capacity()) {
        Note(step, "opens with a wrong sealed count");
      }
    }
    if (static_cast<int32_t>(open_.size()) > machine_->max_sequences) Note(step, "too many open");
    for (const v1::ExtentGrant& grant : step.grants()) {
      if (open_.count(grant.sequence_id()) == 0) Note(step, "grants to what is not open");
      AddRun(step, open_[grant.sequence_id()], grant.run());
    }
    if (Abandons(step)) {
      ++machine_->abandoned;
      response.set_code(1);
      response.set_message("a sequence of the step is abandoned");
      response.set_retry(true);
      return response;
    }
    if (Discards(step, discard)) {
      response.set_code(14);
      response.set_message("the keys in place were not attended to in time");
      response.set_retry(true);
      return response;
    }
    int64_t results = 0;
    for (const v1::StepSequence& what : step.sequences()) {
      RunSequence(step, what, response.add_results());
      results += what.score_token_ids_size() + (what.has_sampling() ? 1 : 0);
    }
    if (results > machine_->max_results) Note(step, "too many results");
    if (step.sequences_size() > machine_->max_decode_rows) Note(step, "too many rows");
    v1::LaneUse* const use = response.add_lanes();
    use->set_lane(v1::LANE_FETCHED);
    use->set_bytes(100);
    use->set_kv_heads(2);
    response.mutable_memory()->set_budget_bytes(1 << 30);
    return response;
  }

  // Whether the step is not run: a sequence of it is abandoned, or goes on from positions that were not run.
  // REQUIRES: the machine's mutex is held.
  bool Abandons(const v1::StepRequest& step) {
    const auto unwanted = [this](const v1::StepSequence& what) {
      const auto at = never_run_.find(what.sequence_id());
      return abandoned_.count(what.sequence_id()) > 0 ||
             (at != never_run_.end() && what.first_pos() > at->second);
    };
    const bool abandons =
        std::any_of(step.sequences().begin(), step.sequences().end(), unwanted);
    for (const v1::StepSequence& what : step.sequences()) {
      if (abandons) {
        const auto [at, added] = never_run_.try_emplace(what.sequence_id(), what.first_pos());
        at->second = std::min(at->second, what.first_pos());
      } else {
        never_run_.erase(what.sequence_id());
      }
    }
    return abandons;
  }
  // Whether the step is discarded: itself, or because a sequence of it goes on from positions that
  // were, until a step begins at those again. REQUIRES: the machine's mutex is held.
  bool Discards(const v1::StepRequest& step, bool discard) {
    if (step.sequences().empty()) return false;
    if (discard) machine_->mailbox_retired = true;
    for (const v1::StepSequence& what : step.sequences()) {
      const auto at = discarded_.find(what.sequence_id());
      discard = discard || (at != discarded_.end() && what.first_pos() > at->second);
    }
    for (const v1::StepSequence& what : step.sequences()) {
      if (!discard) {
        discarded_.erase(what.sequence_id());
        continue;
      }
      const auto [at, added] = discarded_.try_emplace(what.sequence_id(), what.first_pos());
      at->second = std::min(at->second, what.first_pos());
      Scramble(what);
    }
    if (discard) ++machine_->discarded;
    return discard;
  }
  // A discarded step has run, on wrong numbers: what it left from its positions on is no key, and
  // no token.
  void Scramble(const v1::StepSequence& what) {
    const auto at = open_.find(what.sequence_id());
    if (at == open_.end()) return;
    at->second.last_drawn = -1;
    auto& tail = at->second.tail;
    for (auto key = tail.lower_bound(what.first_pos()); key != tail.end(); ++key) key->second = -1;
  }

  void RunSequence(const v1::StepRequest& step, const v1::StepSequence& what,
                   v1::StepSequenceResult* result) {
    result->set_sequence_id(what.sequence_id());
    if (open_.count(what.sequence_id()) == 0) {
      Note(step, "a sequence that is not open");
      return;
    }
    Open& sequence = open_[what.sequence_id()];
    std::vector<int32_t> ids(what.token_ids().begin(), what.token_ids().end());
    if (ids.empty()) ids.push_back(sequence.last_drawn);
    if (ids.size() > 1) machine_->chunk_rows += static_cast<int64_t>(ids.size());
    const int64_t first = what.first_pos();
    const int64_t end = first + static_cast<int64_t>(ids.size());
    const int64_t sealed = what.sealed_tokens();
    if (sealed % kBlockTokens != 0 || sealed > sequence.sealed_tokens || sealed > first) {
      Note(step, absl::StrCat("sealed_tokens ", sealed, " at position ", first));
    }
    if (FloorToBlock(end) > sequence.capacity()) Note(step, "seals where no extent is");
    if (static_cast<int32_t>(ids.size()) > machine_->max_chunk_tokens) Note(step, "a long chunk");
    const bool in_tail = end - sealed <= kTailTokens;
    if (!in_tail && (ids.size() == 1 || first - sealed >= kTailTokens)) {
      Note(step, "more unsealed tokens than the tail holds");
    }
    for (int32_t layer = 0; layer < machine_->geometry.num_layers; ++layer) {
      for (int64_t pos = FirstKey(machine_->windows, layer, first); pos < sealed; ++pos) {
        if (ExtentKey(sequence, layer, pos) >= 0) continue;
        Note(step, absl::StrCat("layer ", layer, " has no key for position ", pos));
        break;
      }
    }
    int32_t full_layer = 0;
    while (WindowOf(machine_->windows, full_layer) != 0) ++full_layer;
    // All keys up to the end: from extents, tail and the step itself.
    std::vector<int32_t> keys;
    for (int64_t pos = 0; pos < end; ++pos) {
      int32_t key = -1;
      if (pos >= first) {
        key = ids[pos - first];
      } else if (pos < sealed) {
        key = ExtentKey(sequence, full_layer, pos);
      } else if (sequence.tail.count(pos) > 0) {
        key = sequence.tail[pos];
      }
      if (key < 0) Note(step, absl::StrCat("there is no key for position ", pos));
      keys.push_back(key);
    }
    for (int i = 0; i < what.score_token_ids_size(); ++i) {
      const std::vector<int32_t> prefix(keys.begin(), keys.begin() + first + i + 1);
      v1::TokenRecord* const scored = result->add_scored();
      scored->set_token_id(what.score_token_ids(i));
      scored->set_logprob(-static_cast<float>(FakeNextToken(prefix)));
    }
    // The tail: what a long chunk leaves is its last, unfinished block.
    for (int64_t pos = first; pos < end; ++pos) sequence.tail[pos] = ids[pos - first];
    const int64_t keep = in_tail ? end - kTailTokens : FloorToBlock(end);
    sequence.tail.erase(sequence.tail.begin(), sequence.tail.lower_bound(keep));
    for (int64_t pos = FloorToBlock(first); pos < FloorToBlock(end); ++pos) {
      SetExtentKey(step, sequence, pos, keys[pos]);
    }
    sequence.sealed_tokens = std::max(sequence.sealed_tokens, FloorToBlock(end));
    result->set_sealed_tokens(sequence.sealed_tokens);
    if (!what.has_sampling()) return;
    sequence.last_drawn = FakeNextToken(keys);
    result->mutable_token()->set_token_id(sequence.last_drawn);
    result->mutable_token()->set_logprob(-1);
  }

  void AddRun(const v1::StepRequest& step, Open& sequence, const v1::ExtentRun& run) {
    if (run.first_pos() != sequence.capacity()) Note(step, "runs do not follow each other");
    sequence.runs.push_back(run);
  }
  int32_t ExtentKey(const Open& sequence, int32_t layer, int64_t pos) {
    for (const v1::ExtentRun& run : sequence.runs) {
      if (pos < run.first_pos() || pos >= run.first_pos() + run.capacity_tokens()) continue;
      const auto at = machine_->extents.find(run.extents(layer).extent_id());
      return at == machine_->extents.end() || run.extents(layer).vacated()
                 ? -1
                 : at->second[pos - run.first_pos()];
    }
    return -1;
  }
  void SetExtentKey(const v1::StepRequest& step, const Open& sequence, int64_t pos, int32_t key) {
    for (const v1::ExtentRun& run : sequence.runs) {
      if (pos < run.first_pos() || pos >= run.first_pos() + run.capacity_tokens()) continue;
      for (const v1::Extent& extent : run.extents()) {
        const auto at = machine_->extents.find(extent.extent_id());
        if (at == machine_->extents.end()) {
          Note(step, "seals into an extent that was freed");
          return;
        }
        at->second[pos - run.first_pos()] = key;
      }
    }
  }
  bool PlanKnown(uint64_t version) {
    for (const v1::Plan& plan : machine_->plans) {
      if (plan.version() == version) return true;
    }
    return false;
  }
  // REQUIRES: the machine's mutex is held.
  void Note(const v1::StepRequest& step, absl::string_view what) {
    noted_.push_back(absl::StrCat("step ", step.number(), ": ", what));
    machine_->mutex.Unlock();
    machine_->Violation(noted_.back());
    machine_->mutex.Lock();
  }

  const std::shared_ptr<FakeMachine> machine_;
  const std::function<void(v1::StepResponse)> on_response_;
  const std::function<void(absl::Status)> on_closed_;
  Mutex mutex_;
  CondVar sent_;
  std::deque<v1::StepRequest> queue_;
  bool stop_ = false;
  int in_flight_[2] = {};
  std::map<uint64_t, int> rows_in_flight_;
  std::map<uint64_t, Open> open_;
  // Sequences of discarded steps, and their first position; guarded by the machine's mutex.
  std::set<uint64_t> abandoned_;           // until they are closed
  std::map<uint64_t, int64_t> never_run_;  // sequence -> the first position
  std::map<uint64_t, int64_t> discarded_;
  uint64_t last_number_ = 0;
  std::vector<std::string> noted_;
  std::thread thread_;
};

class FakeWorkerClient : public WorkerClient {
 public:
  explicit FakeWorkerClient(std::shared_ptr<FakeMachine> machine) : machine_(std::move(machine)) {}

  absl::StatusOr<v1::GetWorkerInfoResponse> GetInfo() override {
    MutexLock lock(&machine_->mutex);
    if (machine_->worker_away) return absl::UnavailableError("worker away");
    v1::GetWorkerInfoResponse info;
    info.set_schema_revision(machine_->worker_revision);
    info.set_minimum_peer_revision(1);
    info.set_device(machine_->device);
    info.mutable_geometry()->set_num_layers(machine_->geometry.num_layers);
    info.mutable_geometry()->set_num_kv_heads(machine_->geometry.num_kv_heads);
    info.mutable_geometry()->set_head_dim(machine_->geometry.head_dim);
    info.set_vocab_size(kFakeVocab);
    info.set_max_position_tokens(machine_->max_position_tokens);
    info.set_max_chunk_tokens(machine_->max_chunk_tokens);
    info.set_max_decode_rows(machine_->max_decode_rows);
    info.set_max_sequences(machine_->max_sequences);
    info.set_max_results(machine_->max_results);
    info.set_incarnation(machine_->incarnation);
    info.mutable_layer_windows()->Add(machine_->windows.begin(), machine_->windows.end());
    const int64_t token_bytes = machine_->geometry.BytesPerToken();
    info.mutable_memory()->set_kv_pool_bytes(machine_->pool_tokens * token_bytes);
    info.mutable_memory()->set_tail_bytes_per_sequence(kTailTokens * token_bytes);
    info.mutable_memory()->set_registered_host_bytes(machine_->registered_host_bytes);
    info.set_plans_built(machine_->plans_built);
    info.set_plans_at_start(machine_->plans_at_start);
    return info;
  }
  absl::Status AttachStore(const std::string&, uint64_t) override {
    MutexLock lock(&machine_->mutex);
    return machine_->worker_away ? absl::UnavailableError("worker away") : absl::OkStatus();
  }
  absl::StatusOr<std::string> OpenMailbox(uint64_t generation) override {
    MutexLock lock(&machine_->mutex);
    if (machine_->worker_away) return absl::UnavailableError("worker away");
    if (machine_->refuse_mailboxes > 0) {
      --machine_->refuse_mailboxes;
      return absl::ResourceExhaustedError("no room for a mailbox");
    }
    const std::string prefix = absl::StrCat("mailbox-", generation, "-");
    if (machine_->mailbox_retired || machine_->mailbox_file.rfind(prefix, 0) != 0) {
      machine_->mailbox_file = absl::StrCat(prefix, ++machine_->mailboxes);
      machine_->mailbox_retired = false;
    }
    return machine_->mailbox_file;
  }
  absl::StatusOr<v1::MeasureLanesResponse> MeasureLanes() override {
    MutexLock lock(&machine_->mutex);
    if (machine_->worker_away) return absl::UnavailableError("worker away");
    return machine_->lane_costs;
  }
  absl::Status PreparePlan(const v1::Plan& plan) override {
    MutexLock lock(&machine_->mutex);
    if (machine_->worker_away) return absl::UnavailableError("worker away");
    machine_->plans.push_back(plan);
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<StepStream>> StartSteps(
      std::function<void(v1::StepResponse)> on_response,
      std::function<void(absl::Status)> on_closed) override {
    {
      MutexLock lock(&machine_->mutex);
      ++machine_->streams;
    }
    return std::make_unique<FakeStepStream>(machine_, std::move(on_response), std::move(on_closed));
  }

 private:
  const std::shared_ptr<FakeMachine> machine_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_WORKER_H_
