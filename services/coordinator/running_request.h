// One admitted request: its sequence, how far its steps have come, and what its client has been
// told.
//
// Not thread-safe: used by the scheduler's thread only. Knows nothing of streams, queues or RPCs.
#ifndef HEADROOM_SERVICES_COORDINATOR_RUNNING_REQUEST_H_
#define HEADROOM_SERVICES_COORDINATOR_RUNNING_REQUEST_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "headroom/v1/inference.pb.h"
#include "headroom/v1/worker.pb.h"
#include "services/coordinator/batch.h"
#include "services/coordinator/lease.h"
#include "services/coordinator/placement/placement.h"
#include "services/coordinator/request.h"
#include "services/coordinator/session_table.h"
#include "services/coordinator/stop_finder.h"

namespace headroom::coordinator {

// Text of tokens that come one by one: whole UTF-8 characters.
class TokenDecoder {
 public:
  virtual ~TokenDecoder() = default;
  virtual std::string Push(int32_t token_id) = 0;
  virtual std::string Finish() = 0;
};

class RunningRequest {
 public:
  // `sequence` holds the request's keys so far: below `cached_tokens` those of the prompt, at and
  // beyond nothing. `decoder` may be null: no text.
  RunningRequest(std::unique_ptr<Request> request, std::shared_ptr<RequestSink> sink,
                 std::unique_ptr<TokenDecoder> decoder, Sequence sequence, int64_t cached_tokens);

  // ---- Steps
  // What the next step may take. `capacity_tokens` counts extents that the worker knows of or that
  // go out with the step.
  const SequenceProgress& progress() const { return progress_; }
  // What its draws go by beside the logits, as far as is known: for a step that opens the sequence.
  // REQUIRES: request().has_history().
  void FillHistory(v1::DrawHistory* out) const;
  // Fills the step's part of this sequence and counts it as sent.
  void Send(const Piece& piece, v1::StepSequence* out);
  // A step with `piece` has returned with `result` (part of `step`).
  void Receive(const Piece& piece, const v1::StepSequenceResult& result,
               const v1::StepResponse& step, absl::Time now);
  // A step with `piece` was discarded by the worker, which still has the sequence: the piece goes out
  // again once everything of the sequence in flight has returned.
  void TakeBack(const Piece& piece);
  bool taking_back() const { return taking_back_ && rows_in_flight_ > 0; }
  // The worker has lost the sequence and everything in flight: it goes on from what is sealed.
  // Tokens that were drawn stay.
  void Restart();
  // A step that the sequence took part in failed. True while it is worth another try: less than
  // kMaxFailures failures since its last step that worked.
  bool CountFailure() { return ++failures_ < kMaxFailures; }

  void AddRun(v1::ExtentRun run);
  // The store has acknowledged what is sealed up to `tokens`.
  void Committed(int64_t tokens);
  void set_may_run(bool may_run) { progress_.may_run = may_run; }

  // ---- Client
  void Accept();
  // Ends it towards the client; a step in flight may still return. Does nothing when ended already.
  void End(const absl::Status& status, v1::FinishReason reason);
  bool ended() const { return ended_; }

  const Request& request() const { return *request_; }
  RequestSink& sink() { return *sink_; }
  Sequence& sequence() { return sequence_; }
  const Sequence& sequence() const { return sequence_; }
  int64_t generated_tokens() const { return generated_; }
  int64_t cached_tokens() const { return cached_tokens_; }
  int64_t prompt_tokens() const { return static_cast<int64_t>(request_->prompt.size()); }
  int rows_in_flight() const { return rows_in_flight_; }
  bool chunk_in_flight() const { return chunks_in_flight_ > 0; }
  // As the planner sees it: with the runs that it will have when `horizon_tokens` are there.
  SequenceShape Shape(const ExtentRules& rules, int64_t horizon_tokens) const;

  // What the scheduler keeps with it.
  int64_t reserved_tokens = 0;
  int64_t reserved_bytes = 0;
  int64_t reserved_runs = 0;
  size_t runs_on_worker = 0;    // the first so many runs have been sent
  bool open_on_worker = false;  // the opening has been sent
  bool id_forgotten = false;  // another may have it: a client that was told to try again, say
  bool abandon_sent = false;
  bool close_sent = false;
  bool lease_in_flight = false;
  int lease_failures = 0;      // since the last that worked
  absl::Time lease_retry;      // not before
  bool leased = false;         // everything that is known of the sequence has a place
  uint64_t plan_version = 0;   // least version that it may run under; 0: none was made for it yet
  int64_t horizon_tokens = 0;  // what that plan foresees for it
  absl::Time paused_since = absl::InfiniteFuture();
  // Fills what only the scheduler knows of the terminal event's explanation.
  v1::Explanation explanation;

 private:
  static constexpr int kMaxFailures = 3;

  void TakeScores(const Piece& piece, const v1::StepSequenceResult& result);
  void TakeToken(const v1::TokenRecord& token, absl::Time now);
  // The reason to stop after `token_id`, if it is one.
  std::optional<v1::StopMatch> StopsAt(int32_t token_id) const;
  void Account(const v1::StepResponse& step);
  v1::Finished Summary(v1::FinishReason reason) const;

  const std::unique_ptr<Request> request_;
  const std::shared_ptr<RequestSink> sink_;
  const std::unique_ptr<TokenDecoder> decoder_;
  const int64_t cached_tokens_;
  Sequence sequence_;
  SequenceProgress progress_;
  StopFinder stop_finder_;
  int rows_in_flight_ = 0;
  int chunks_in_flight_ = 0;
  bool taking_back_ = false;
  int failures_ = 0;
  bool accepted_ = false;
  bool ended_ = false;

  int64_t generated_ = 0;
  int64_t prefill_steps_ = 0;
  int64_t decode_steps_ = 0;
  std::vector<v1::TokenRecord> prompt_scores_;  // of prompt tokens 1, 2, ...
  std::optional<v1::StopMatch> stop_;
  std::optional<absl::Time> first_step_;
  std::optional<absl::Time> first_token_;
  absl::Time last_token_;
  absl::Time prompt_done_;  // the epoch: not yet
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_RUNNING_REQUEST_H_
