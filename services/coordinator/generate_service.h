// One Generate or GenerateOnce call: between the RPC library's reactions and the scheduler's
// results.
//
// A call keeps itself alive until the RPC library is done with it; the scheduler holds it as a
// sink. The call of several answers ends when all have, or when one has failed, which ends the
// others.
#ifndef HEADROOM_SERVICES_COORDINATOR_GENERATE_SERVICE_H_
#define HEADROOM_SERVICES_COORDINATOR_GENERATE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "common/mutex.h"
#include "headroom/v1/inference.pb.h"
#include "services/coordinator/request.h"
#include "services/coordinator/scheduler.h"
#include "services/coordinator/served_model.h"

namespace headroom::coordinator {

// Metadata of a call that failed: the request's id, and when to try again.
void AddErrorMetadata(grpc::CallbackServerContext* context, const std::string& request_id,
                      const absl::Status& status);

// Deltas of an answer that the client has not taken yet are put together into one, so at most two
// messages of each answer and one more wait; at kMaxPendingTokens all answers pause.
class GenerateStream : public grpc::ServerWriteReactor<v1::GenerateResponse>, public RequestSink {
 public:
  static constexpr int64_t kMaxPendingTokens = 256;

  // The reactor of a call whose request has its places with the scheduler (Scheduler::Reserve). Submit() or Refuse()
  // follows, once, on any thread; the call's message lives until then.
  static std::shared_ptr<GenerateStream> Make(grpc::CallbackServerContext* context, Scheduler* scheduler,
                                              const Request& request);
  void Submit(const ServedModel& model, const Request& request);
  void Refuse(const absl::Status& status);  // gives the places up

  void OnAccepted() override;
  void OnDelta(v1::Delta delta) override;
  void OnFinished(const absl::Status& status, v1::Finished finished) override;
  bool CanTake() const override;

 private:
  GenerateStream(grpc::CallbackServerContext* context, Scheduler* scheduler,
                 const Request& request);

  // Reactions.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void Fail(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  grpc::CallbackServerContext* const context_;
  Scheduler* const scheduler_;
  const std::string request_id_;
  std::shared_ptr<GenerateStream> self_;

  mutable Mutex mutex_;
  std::deque<v1::GenerateResponse> queue_ ABSL_GUARDED_BY(mutex_);  // front: being written
  std::optional<v1::Accepted> accepted_ ABSL_GUARDED_BY(mutex_);  // until it is queued
  int32_t answers_left_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;    // the client takes nothing any more
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;     // nothing more will be queued
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // Finish() has been called
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  int64_t pending_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
};

// The same, gathered into one message.
class GenerateOnceCall : public grpc::ServerUnaryReactor, public RequestSink {
 public:
  static std::shared_ptr<GenerateOnceCall> Make(grpc::CallbackServerContext* context, Scheduler* scheduler,
                                                const Request& request, v1::GenerateOnceResponse* response);
  void Submit(const ServedModel& model, const Request& request);
  void Refuse(const absl::Status& status);

  void OnAccepted() override {}
  void OnDelta(v1::Delta delta) override;
  void OnFinished(const absl::Status& status, v1::Finished finished) override;
  bool CanTake() const override { return true; }

 private:
  GenerateOnceCall(grpc::CallbackServerContext* context, Scheduler* scheduler,
                   const Request& request, v1::GenerateOnceResponse* response);
  void Fail(const absl::Status& status);
  void OnCancel() override {
    if (!ended_.load()) scheduler_->Cancel(request_id_);
  }
  void OnDone() override { const std::shared_ptr<GenerateOnceCall> self = std::move(self_); }

  grpc::CallbackServerContext* const context_;
  Scheduler* const scheduler_;
  const std::string request_id_;
  std::atomic<bool> ended_{false};            // the id may soon be that of another call
  v1::GenerateOnceResponse* const response_;  // not touched once answers_left_ is 0
  int32_t answers_left_;                      // whose Submit() it is, then the scheduler's thread
  std::shared_ptr<GenerateOnceCall> self_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_GENERATE_SERVICE_H_
