// The steps in flight: composes them from the running requests, two of each kind ahead, and gives
// what returns to the requests.
//
// Not thread-safe: used by the scheduler's thread only. Knows no stream: steps leave by a function.
#ifndef HEADROOM_SERVICES_COORDINATOR_STEP_PIPELINE_H_
#define HEADROOM_SERVICES_COORDINATOR_STEP_PIPELINE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "headroom/v1/worker.pb.h"
#include "services/coordinator/batch.h"
#include "services/coordinator/running_request.h"

namespace headroom::coordinator {

class StepPipeline {
 public:
  using Send = std::function<void(v1::StepRequest)>;
  using Requests = std::vector<std::unique_ptr<RunningRequest>>;

  // Steps of one kind that the worker takes before it has answered.
  static constexpr int kDepth = 2;

  explicit StepPipeline(Send send) : send_(std::move(send)) {}

  void set_limits(const StepLimits& limits) { limits_ = limits; }
  // A new stream: nothing is in flight, no sequence is open.
  void Reset();
  // The worker is to close the sequence with the next step. REQUIRES: none of its steps is in
  // flight.
  void Close(uint64_t sequence_id) { to_close_.push_back(sequence_id); }

  // The worker is to stop what the sequence has in flight, at the next layer border. Its steps return with
  // `retry`.
  void Abandon(uint64_t sequence_id);

  // Sends what may be sent. `requests` stay in place while a step of theirs is in flight.
  void Pump(Requests& requests, uint64_t plan_version);

  struct Returned {
    // Not OK: the step failed, or the answer was none to it. What is in flight can no longer be
    // trusted: Reset() and begin a new stream.
    absl::Status status;
    // The step was discarded; its requests take back what they had sent. Status is OK.
    bool retry = false;
    bool abandoned = false;  // for no other reason than Abandon()
    std::vector<RunningRequest*> failed;  // requests that took part in a failed step
    std::vector<uint64_t> closed;         // sequences that the worker has closed
  };
  Returned Receive(const v1::StepResponse& response, absl::Time now);

  bool idle() const { return in_flight_.empty(); }
  int64_t steps_returned() const { return steps_returned_; }

 private:
  enum Kind { kTokens, kChunk };
  struct Entry {
    RunningRequest* request;
    Piece piece;
  };
  struct InFlight {
    uint64_t number;
    Kind kind;
    std::vector<Entry> entries;
    std::vector<uint64_t> closes;
  };

  int CountInFlight(Kind kind) const;
  static void OpenOneHistory(const Requests& requests, std::vector<BatchEntry>& batch);
  bool SendOne(Kind kind, Requests& requests, uint64_t plan_version);
  void Add(RunningRequest& request, const Piece& piece, v1::StepRequest& step, InFlight& flight);

  const Send send_;
  StepLimits limits_;
  std::deque<InFlight> in_flight_;
  std::vector<uint64_t> to_close_;
  uint64_t next_number_ = 1;
  int next_turn_ = 0;
  int64_t steps_returned_ = 0;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_STEP_PIPELINE_H_
