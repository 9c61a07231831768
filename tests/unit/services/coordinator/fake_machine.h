// What the tests' stand-ins for a worker and a store share: the machine whose segment both map, its faults, and the
// model that says what follows some tokens. fake_store.h, fake_worker.h: no RPC, no model, but the protocol to the
// letter.
//
// Whatever a real peer would refuse is noted in violations(), and so is a step that in any layer would read a key
// whose extent has been given back.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_MACHINE_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_MACHINE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "common/kv_layout.h"
#include "common/mutex.h"
#include "services/coordinator/placement/placement.h"
#include "services/coordinator/store_client.h"
#include "services/coordinator/worker_client.h"

namespace headroom::coordinator {

inline constexpr int32_t kFakeVocab = 1000;

// What the fake model says after `tokens`.
inline int32_t FakeNextToken(const std::vector<int32_t>& tokens) {
  uint64_t hash = 1469598103934665603u;
  for (const int32_t token : tokens) hash = (hash ^ static_cast<uint32_t>(token)) * 1099511628211u;
  return static_cast<int32_t>((hash >> 20) % kFakeVocab);
}

// `count` tokens after `tokens`.
inline std::vector<int32_t> FakeAnswer(std::vector<int32_t> tokens, int64_t count) {
  std::vector<int32_t> answer;
  for (int64_t i = 0; i < count; ++i) {
    answer.push_back(FakeNextToken(tokens));
    tokens.push_back(answer.back());
  }
  return answer;
}

// The machine: the segment's extents by id, the two processes' settings and their faults.
class FakeMachine {
 public:
  KvGeometry geometry = {2, 2, 64};
  LayerWindows windows;  // tokens are drawn from the keys of a layer without one
  int64_t host_tokens = 1 << 16;
  int64_t pool_tokens = 1 << 14;  // of device memory
  int64_t max_position_tokens = 1 << 16;
  int32_t max_chunk_tokens = 128;
  int32_t max_decode_rows = 8;
  int32_t max_sequences = 8;
  int32_t max_results = 64;
  std::atomic<int64_t> registered_host_bytes = 0;  // may grow while it serves, as may plans_built
  std::atomic<int64_t> plans_built = 0;
  int64_t plans_at_start = 0;

  void Violation(std::string what) {
    MutexLock lock(&mutex);
    violations_.push_back(std::move(what));
  }
  std::vector<std::string> violations() {
    MutexLock lock(&mutex);
    return violations_;
  }

  struct Stored {
    std::vector<v1::ExtentRun> runs;
    int64_t sealed_tokens = 0;
  };

  Mutex mutex;
  // ---- Guarded by mutex.
  uint64_t generation = 1;
  uint64_t incarnation = 1;
  bool store_away = false;
  bool worker_away = false;
  int lost_truncations = 0;       // so many calls more end with DEADLINE_EXCEEDED and nothing done
  bool refuses_truncations = false;
  bool bound_by_another = false;  // until it is bound again
  absl::Duration step_time = absl::ZeroDuration();
  int64_t steps_that_wait = 0;  // so many steps, the first ones, are answered once the next has come
  std::map<uint32_t, std::vector<int32_t>> extents;  // a token for each position, or -1
  int64_t most_used_bytes = 0;
  std::map<uint64_t, Stored> stored;
  uint32_t next_extent = 1;
  v1::MeasureLanesResponse lane_costs;  // empty: unknown, so that everything else is fetched
  int32_t attend_threads = 0;
  std::string device = "fake";
  int mailboxes = 0;                  // that the worker has made
  std::string mailbox_file;           // the latest
  bool mailbox_retired = false;       // a step whose keys did not come has given it up
  int mailboxes_attached = 0;         // at the store
  int refuse_mailboxes = 0;           // so many calls more will not get one
  std::set<int64_t> discard_steps;    // counts since the start: answered with `retry`
  int64_t discarded = 0;              // with them: those that went on from them
  int32_t worker_revision = 2;        // of the worker's schema; 2 knows abandoned sequences
  int64_t abandoned = 0;              // steps that were not run because of one
  int streams = 0;                    // of steps, since the start
  int64_t steps = 0;
  int64_t chunk_rows = 0;             // of steps with more than one token of a sequence
  std::map<int64_t, int> fail_steps;  // count of the step since the start -> google.rpc.Code
  std::set<int64_t> break_at_steps;   // the stream breaks instead of answering
  std::vector<v1::Plan> plans;
  std::vector<v1::StepRequest> sent;

  int64_t used_bytes() {
    int64_t tokens = 0;  // of one layer each
    for (const auto& [id, keys] : extents) tokens += static_cast<int64_t>(keys.size());
    return tokens * geometry.BytesPerTokenPerLayer();
  }
  int64_t used_tokens() { return used_bytes() / geometry.BytesPerToken(); }

 private:
  std::vector<std::string> violations_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_MACHINE_H_
