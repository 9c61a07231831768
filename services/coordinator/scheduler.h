// Admits requests in the order in which their prompts are there and keeps the step loop going.
//
// Threads. Everything happens on the scheduler's own thread, as tasks (what clients, worker and
// store say) followed by one Tick(), which looks at all there is and does what can be done: end
// what is over, admit, lease extents, prepare a plan, send steps. No task waits for anything: calls
// that block run on the thread of Peers. Public methods are thread-safe unless they say otherwise.
#ifndef HEADROOM_SERVICES_COORDINATOR_SCHEDULER_H_
#define HEADROOM_SERVICES_COORDINATOR_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/mutex.h"
#include "common/task_thread.h"
#include "headroom/v1/admin.pb.h"
#include "headroom/v1/inference.pb.h"
#include "services/coordinator/admission.h"
#include "services/coordinator/peers.h"
#include "services/coordinator/placement/placement.h"
#include "services/coordinator/placement/step_model.h"
#include "services/coordinator/request.h"
#include "services/coordinator/running_request.h"
#include "services/coordinator/session_table.h"
#include "services/coordinator/step_pipeline.h"

namespace headroom::coordinator {

struct SchedulerOptions {
  int64_t max_queue = 128;
  int64_t max_sessions = 1024;
  // Whether a segment that holds another model's keys may be cleaned.
  bool allow_clean = false;
  // Requests end with UNAVAILABLE when worker or store have been away for so long.
  absl::Duration lost_peer_timeout = absl::Seconds(60);
  // ... with RESOURCE_EXHAUSTED when their client has taken nothing for so long.
  absl::Duration slow_client_timeout = absl::Seconds(60);
};

// What was found at the latest connection.
struct PeerFacts {
  v1::GetWorkerInfoResponse worker;
  v1::GetStoreInfoResponse store;
};

class Scheduler {
 public:
  // `on_serving` is told, on the scheduler's thread, whenever requests begin or cease to be served.
  Scheduler(const SchedulerOptions& options, std::unique_ptr<WorkerClient> worker,
            std::unique_ptr<StoreClient> store, std::function<void(bool)> on_serving);
  ~Scheduler();
  void Start();
  // Ends every request with UNAVAILABLE. No sink is called any more once it returns.
  void Stop();

  // Takes the id and, for each answer, a place in the queue, for a request whose prompt is to be tokenized first:
  // a Submit() that works or GiveUp() follows. ALREADY_EXISTS: the id is in use; RESOURCE_EXHAUSTED: the queue is full;
  // UNAVAILABLE: draining, or no worker has been found yet.
  absl::Status Reserve(const std::string& request_id, int32_t answers);
  void GiveUp(const std::string& request_id);
  // Whether it has been cancelled or aborted since: then its prompt is not wanted.
  bool IsEnding(const std::string& request_id) const;
  // Queues a request that has its places. FAILED_PRECONDITION: its placement cannot be served; UNAVAILABLE: stopping.
  // Whatever is found later goes to the sink. Each answer has a decoder of its own; it may be null.
  absl::Status Submit(const Request& request, std::shared_ptr<RequestSink> sink,
                      const std::function<std::unique_ptr<TokenDecoder>()>& make_decoder);
  // Its client has gone. Like an abortion it waits for Submit() where that is still to come.
  void Cancel(const std::string& request_id);
  // Ends with FINISH_REASON_CANCELLED. An unknown id is one that has ended already.
  void Abort(const std::string& request_id);
  // A sink can take more.
  void Wake();

  // Of the latest connection; null before the first.
  std::shared_ptr<const PeerFacts> facts() const;

  // Answers come on the scheduler's thread; they must not block. False if it has stopped: no
  // answer.
  bool GetSession(const std::string& id, std::function<void(absl::StatusOr<v1::Session>)> answer);
  bool ListSessions(const std::string& after, size_t most,
                    std::function<void(std::vector<v1::Session>)> answer);
  bool UpdateSession(const std::string& id, std::optional<int64_t> ttl_ms,
                     std::optional<bool> pinned,
                     std::function<void(absl::StatusOr<v1::Session>)> answer);
  bool DeleteSession(const std::string& id, std::function<void(absl::Status)> answer);
  // Drops every idle session; answers how many.
  bool Flush(std::function<void(int32_t)> answer);
  // Refuses new requests from now on; answers when none is left.
  bool Drain(std::function<void()> answer);
  // What the worker says of itself between connections and steps: shown by GetStatus().
  void NoteWorker(const v1::GetWorkerInfoResponse& worker);
  // Everything but version, model and addresses.
  bool GetStatus(std::function<void(v1::GetStatusResponse)> answer);

 private:
  // Tokens that a plan foresees beyond those there are.
  static constexpr int64_t kHorizonTokens = 1024;
  static constexpr absl::Duration kRetryInterval = absl::Seconds(1);

  struct Waiting {
    std::unique_ptr<Request> request;
    std::shared_ptr<RequestSink> sink;
    std::unique_ptr<TokenDecoder> decoder;
  };
  struct Ending {
    absl::Status status;
    v1::FinishReason reason;
  };
  // A request that is reserved, waits or runs.
  struct Known {
    int64_t answers_left = 0;
    bool reserved = true;          // not yet on the scheduler's thread
    std::optional<Ending> ending;  // what was asked for until then
  };
  // Sequences whose extents are to be freed; until the store has done so they count as taken.
  struct Leaving {
    std::vector<uint64_t> sequence_ids;
    int64_t host_bytes = 0;
    int64_t runs = 0;
  };
  struct PlanInForce {
    uint64_t version = 0;        // the latest that was made
    uint64_t ready_version = 0;  // the latest that steps may name; 0: none
    bool preparing = false;
    bool wanted_anew = true;  // what it was made for has changed
    Placement placement;      // of `version`
  };

  // ---- Peers (scheduler_peers.cc)
  Peers::Events MakeEvents();
  void OnConnected(PeersFound found);
  void OnResponse(const v1::StepResponse& response);
  void OnStore(const absl::StatusOr<v1::GetStoreInfoResponse>& info);
  void Disconnect(const absl::Status& why);
  // Whether the store answered a call of `connection` for another coordinator: then it is bound again.
  bool IsFenced(const absl::Status& from_store, uint64_t connection);
  void ReconcileWithStore(const std::vector<v1::StoredSequence>& stored);
  void MaintainReattachment();
  // The store is told that the sequence ends there; nothing more is asked of it for the sequence before it has
  // acknowledged that.
  void TruncateAtStore(uint64_t sequence_id, int64_t tokens);
  void MaintainTruncations();
  void OnTruncated(uint64_t sequence_id, int64_t tokens, const absl::Status& status);
  void MaintainLeases();
  std::vector<int64_t> LeasesNeeded(const RunningRequest& request) const;
  // Whether it will need extents that it does not have to compute all that is known of it, and go on.
  bool LacksExtents(const RunningRequest& request) const;
  void OnLeased(uint64_t sequence_id, uint64_t connection, const absl::Status& status,
                std::vector<v1::ExtentRun> runs);
  void MaintainCommits();
  void OnCommitted(const std::vector<v1::SealedSequence>& sealed,
                   const std::set<std::string>& sessions);
  void MaintainReleases();
  void UpdateServing();

  // ---- Admission and plan (scheduler_admission.cc)
  void AdmitFromQueue(absl::Time now);
  // Whether the head of the queue was taken out: admitted or refused.
  bool TryAdmit(Waiting& head, absl::Time now);
  // REQUIRES: connected, so that capacities are known. True if it was refused.
  bool RefuseIfItNeverFits(Waiting& waiting);
  void Begin(Waiting& waiting, const Verdict& verdict, absl::Time now);
  // The session's sequence for the request, without what it cannot use; sets `cached_tokens`.
  absl::StatusOr<Sequence> TakeSequence(const Request& request, absl::Time now,
                                        int64_t* cached_tokens);
  // `alone`: as if nothing else ran.
  Verdict Judge(const Request& request, const Session* session, bool alone) const;
  Commitments CommitmentsBeside(bool alone) const;
  Verdict JudgeShares(const Request& request, bool alone, Verdict verdict) const;
  bool PlacementFits(const Request& request) const;
  // Salt and wishes respected.
  int64_t CachedTokensFor(const Request& request, const Session& session) const;
  static int64_t FirstHorizon(const Request& request);
  int64_t HorizonOf(const RunningRequest& request) const;
  std::vector<SequenceShape> RunningShapes() const;
  bool PlanOutgrown() const;
  Placement PlaceRunning(const PlacementSpec& spec) const;
  void MaintainPlan();
  // A decode step has told what its lanes did.
  void ObserveStep(const v1::StepResponse& response);
  void OnPlanPrepared(uint64_t version, uint64_t connection, const absl::Status& status);

  // ---- Sessions and status (scheduler_sessions.cc)
  void MaintainSessions(absl::Time now);
  void ReleaseLater(const Sequence& sequence);
  v1::Session Describe(const Session& session) const;
  v1::GetStatusResponse DescribeStatus() const;

  // ---- The loop, beginnings and ends of requests
  void Tick();
  void ExpireRequests(absl::Time now);
  void UpdateMayRun(absl::Time now);
  void EnqueueAnswers(std::vector<Waiting> answers);
  void Enqueue(Waiting waiting);
  // Of the request: ends every answer, now or when it is there.
  void EndLater(const std::string& request_id, const absl::Status& status, v1::FinishReason reason);
  void EndRequest(const std::string& request_id, const absl::Status& status,
                  v1::FinishReason reason);
  void Refuse(Waiting& waiting, const absl::Status& status,
              v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED);
  void SweepEnded();
  // The worker has let go of the sequence: it goes back to its session, or its extents are freed.
  void LetGo(std::unique_ptr<RunningRequest> request);
  RunningRequest* FindRunning(uint64_t sequence_id);
  // One of its answers has ended.
  void ForgetId(const std::string& request_id);
  // Answers that wait; reserved ones too.
  int64_t num_waiting() const {
    MutexLock lock(&mutex_);
    return num_waiting_;
  }
  // Whether no request is reserved, waits or runs. An ended one whose worker is away only waits to be let go.
  bool Drained() const;

  const SchedulerOptions options_;
  const std::function<void(bool)> on_serving_;

  mutable Mutex mutex_;
  std::map<std::string, Known> known_ ABSL_GUARDED_BY(mutex_);  // by request id
  int64_t num_waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  std::shared_ptr<const PeerFacts> facts_ ABSL_GUARDED_BY(mutex_);

  // Scheduler's thread only.
  std::deque<Waiting> queue_;
  StepPipeline::Requests running_;  // in order of admission; ended ones until the worker let go
  SessionTable sessions_;
  StepPipeline pipeline_;
  Capacity capacity_;
  StepModel step_model_;
  bool in_place_exact_ = false;  // keys in place give the bits that they give elsewhere
  PlanInForce plan_;
  uint64_t next_sequence_id_ = 1;
  bool stopping_ = false;
  bool connected_ = false;
  bool worker_abandons_ = false;  // it knows StepRequest.abandon_sequence_ids
  bool reattach_ = false;  // the store has been started anew: connect when nothing is in flight
  bool store_answers_ = false;
  bool serving_ = false;
  uint64_t connections_ = 0;
  std::string connect_failure_;  // the latest, until connected
  absl::Time disconnected_since_;
  absl::Time store_away_since_ = absl::InfiniteFuture();
  absl::Time reattach_since_;
  std::map<uint64_t, int64_t> truncations_;  // sequence id -> tokens that the store is to keep
  bool truncation_in_flight_ = false;
  absl::Time truncation_retry_;
  bool commit_in_flight_ = false;
  absl::Time commit_retry_;
  std::set<std::string> uncommitted_sessions_;
  bool release_in_flight_ = false;
  absl::Time release_retry_;
  Leaving to_release_;
  Leaving in_release_;
  absl::Time next_session_sweep_;
  std::vector<std::function<void()>> drained_;
  v1::GetStatusResponse totals_;  // counters since the start
  v1::DeviceMemory device_memory_;
  int64_t plans_built_ = 0;  // the worker's
  int64_t plans_at_start_ = 0;

  TaskThread thread_;
  std::unique_ptr<Peers> peers_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_SCHEDULER_H_
