#include "services/coordinator/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/lease.h"
#include "services/coordinator/placement/predict.h"
#include "services/coordinator/plan_proto.h"

namespace headroom::coordinator {
namespace {

// How often deadlines are looked at when nothing else happens.
constexpr absl::Duration kTick = absl::Milliseconds(50);

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, std::unique_ptr<WorkerClient> worker,
                     std::unique_ptr<StoreClient> store, std::function<void(bool)> on_serving)
    : options_(options),
      on_serving_(std::move(on_serving)),
      sessions_(options.max_sessions),
      pipeline_([this](v1::StepRequest step) { peers_->Send(std::move(step)); }),
      disconnected_since_(absl::Now()),
      thread_(kTick, [this] { Tick(); }),
      peers_(std::make_unique<Peers>(std::move(worker), std::move(store), options.allow_clean,
                                     &thread_, MakeEvents())) {
  // Versions rise over restarts of the coordinator too: a worker may still know older ones.
  plan_.version = static_cast<uint64_t>(absl::ToUnixMicros(absl::Now()));
}

Scheduler::~Scheduler() { Stop(); }

void Scheduler::Start() {
  peers_->Start();
  thread_.Post([this] { peers_->Connect(); });
  thread_.Start();
}

void Scheduler::Stop() {
  {
    MutexLock lock(&mutex_);
    draining_ = true;
  }
  thread_.Post([this] {
    stopping_ = true;
    for (Waiting& waiting : queue_) Refuse(waiting, StoppingError());
    queue_.clear();
    for (auto& request : running_) {
      request->End(StoppingError(), v1::FINISH_REASON_UNSPECIFIED);
    }
  });
  thread_.Stop();
}

// ---------------------------------------------------------------- from clients

absl::Status Scheduler::Submit(std::unique_ptr<Request> request, std::shared_ptr<RequestSink> sink,
                               std::unique_ptr<TokenDecoder> decoder) {
  {
    MutexLock lock(&mutex_);
    if (draining_) return DrainingError();
    if (facts_ == nullptr) return NotReadyError("no worker and store have been found yet");
    const int32_t attend_threads = facts_->store.attend_threads();
    if (!request->placement.automatic && request->placement.share(Lane::kInPlace) > 0 &&
        attend_threads == 0) {
      return InPlaceNotServedError(attend_threads);
    }
    if (num_waiting_ >= options_.max_queue) return QueueFullError(options_.max_queue);
    if (!ids_.insert(request->id).second) return IdInUseError(request->id);
    ++num_waiting_;
  }
  // A task must be copyable; ownership passes through a shared pointer.
  auto waiting = std::make_shared<Waiting>();
  waiting->request = std::move(request);
  waiting->sink = std::move(sink);
  waiting->decoder = std::move(decoder);
  const std::string id = waiting->request->id;
  if (thread_.Post([this, waiting] { Enqueue(std::move(*waiting)); })) return absl::OkStatus();
  MutexLock lock(&mutex_);
  ids_.erase(id);
  --num_waiting_;
  return StoppingError();
}

void Scheduler::Cancel(const std::string& request_id) {
  thread_.Post([this, request_id] {
    for (auto at = queue_.begin(); at != queue_.end(); ++at) {
      if (at->request->id != request_id) continue;
      Refuse(*at, ClientGoneError());
      queue_.erase(at);
      return;
    }
    RunningRequest* const running = FindRunning(request_id);
    if (running != nullptr) running->End(ClientGoneError(), v1::FINISH_REASON_UNSPECIFIED);
  });
}

void Scheduler::Abort(const std::string& request_id) {
  thread_.Post([this, request_id] {
    for (auto at = queue_.begin(); at != queue_.end(); ++at) {
      if (at->request->id != request_id) continue;
      Refuse(*at, absl::OkStatus(), v1::FINISH_REASON_CANCELLED);
      queue_.erase(at);
      return;
    }
    RunningRequest* const running = FindRunning(request_id);
    if (running != nullptr) running->End(absl::OkStatus(), v1::FINISH_REASON_CANCELLED);
  });
}

void Scheduler::Wake() {
  thread_.Post([] {});
}

std::shared_ptr<const PeerFacts> Scheduler::facts() const {
  MutexLock lock(&mutex_);
  return facts_;
}

// ---------------------------------------------------------------- the loop

void Scheduler::Tick() {
  const absl::Time now = absl::Now();
  ExpireRequests(now);
  MaintainReattachment();
  SweepEnded();
  MaintainReleases();
  AdmitFromQueue(now);
  MaintainLeases();
  MaintainPlan();
  UpdateMayRun(now);
  if (connected_ && !reattach_ && plan_.ready_version != 0) {
    pipeline_.Pump(running_, plan_.ready_version);
  }
  MaintainCommits();
  MaintainSessions(now);
  UpdateServing();
  if (queue_.empty() && running_.empty()) {
    for (auto& answer : std::exchange(drained_, {})) answer();
  }
}

void Scheduler::ExpireRequests(absl::Time now) {
  const bool lost = !connected_ && now - disconnected_since_ > options_.lost_peer_timeout;
  // The reason to end now, or nothing.
  const auto over = [&](const Request& request) -> std::optional<absl::Status> {
    if (now >= request.deadline) return DeadlinePassedError();
    if (lost) return PeerLostError(now - disconnected_since_, connect_failure_);
    if (now - request.arrival >= request.time_limit) return absl::OkStatus();
    return std::nullopt;
  };
  for (auto at = queue_.begin(); at != queue_.end();) {
    const std::optional<absl::Status> status = over(*at->request);
    if (status.has_value()) Refuse(*at, *status, v1::FINISH_REASON_TIME_LIMIT);
    at = status.has_value() ? queue_.erase(at) : at + 1;
  }
  for (auto& request : running_) {
    const std::optional<absl::Status> status = over(request->request());
    if (status.has_value()) request->End(*status, v1::FINISH_REASON_TIME_LIMIT);
  }
}

// What a sink cannot take must not pile up: its request pauses, and ends if that lasts.
void Scheduler::UpdateMayRun(absl::Time now) {
  for (auto& request : running_) {
    const bool takes = request->sink().CanTake();
    if (takes) {
      request->paused_since = absl::InfiniteFuture();
    } else if (request->paused_since == absl::InfiniteFuture()) {
      request->paused_since = now;
    } else if (now - request->paused_since > options_.slow_client_timeout) {
      request->End(SlowClientError(now - request->paused_since), v1::FINISH_REASON_UNSPECIFIED);
    }
    request->set_may_run(takes && !request->ended() && request->leased &&
                         request->plan_version != 0 &&
                         request->plan_version <= plan_.ready_version);
  }
}

// ---------------------------------------------------------------- admission

void Scheduler::Refuse(Waiting& waiting, const absl::Status& status, v1::FinishReason reason) {
  ForgetId(waiting.request->id);
  {
    MutexLock lock(&mutex_);
    --num_waiting_;
  }
  v1::Finished finished;
  finished.mutable_usage()->set_prompt_tokens(static_cast<int64_t>(waiting.request->prompt.size()));
  if (status.ok()) {
    finished.set_reason(reason);
    waiting.sink->OnAccepted();
  } else {
    LogInfo(absl::StrCat("refused: ", status.message()), waiting.request->id);
  }
  waiting.sink->OnFinished(status, std::move(finished));
}

void Scheduler::Enqueue(Waiting waiting) {
  if (stopping_) {  // it was submitted while Stop() began
    Refuse(waiting, StoppingError());
    return;
  }
  // What can never fit is refused at once, not when its turn comes.
  if (connected_) {
    const Request& request = *waiting.request;
    const Verdict verdict = Judge(request, sessions_.Find(request.session_id), /*alone=*/true);
    if (verdict.kind == Verdict::kNever) {
      Refuse(waiting, NeverFitsError(verdict.reason));
      return;
    }
  }
  queue_.push_back(std::move(waiting));
}

void Scheduler::AdmitFromQueue(absl::Time now) {
  while (connected_ && !reattach_ && !queue_.empty() && TryAdmit(queue_.front(), now)) {
    queue_.pop_front();
  }
}

Verdict Scheduler::Judge(const Request& request, const Session* session, bool alone) const {
  Commitments commitments;
  commitments.idle_tokens = sessions_.idle_capacity_tokens();
  commitments.idle_runs = sessions_.idle_runs();
  Demand demand;
  demand.final_tokens = request.end_pos();
  if (session != nullptr && !session->busy) {
    // What the session has is given up or taken over; it is counted once.
    commitments.idle_tokens -= session->sequence.capacity_tokens();
    commitments.idle_runs -= static_cast<int64_t>(session->sequence.runs.size());
    const int64_t cached = CachedTokensFor(request, *session);
    for (const v1::ExtentRun& run : session->sequence.runs) {
      if (run.first_pos() >= cached) break;
      demand.kept_tokens = run.first_pos() + run.capacity_tokens();
      ++demand.kept_runs;
    }
  }
  if (!alone) {
    commitments.running_tokens = to_release_.tokens + in_release_.tokens;
    commitments.running_runs = to_release_.runs + in_release_.runs;
    for (const auto& running : running_) {
      commitments.running_tokens += running->reserved_tokens;
      commitments.running_runs += running->reserved_runs;
      ++commitments.running_sequences;
    }
  }
  Verdict verdict = Admit(capacity_, commitments, demand);
  if (verdict.kind != Verdict::kAdmit || request.placement.automatic) return verdict;
  // Shares are taken at their word: resident keys must fit beside all tails.
  std::vector<SequenceShape> shapes;
  if (!alone) shapes = RunningShapes();
  shapes.push_back(ForeseenShape(capacity_.geometry, static_cast<int64_t>(request.prompt.size()),
                                 FirstHorizon(request)));
  const int64_t pool = capacity_.kv_pool_bytes -
                       static_cast<int64_t>(shapes.size()) * capacity_.tail_bytes_per_sequence;
  const int64_t resident = ResidentBytes(
      capacity_.geometry, PlaceByShares(capacity_.geometry, request.placement, shapes), shapes);
  if (resident > pool) {
    verdict.kind = alone ? Verdict::kNever : Verdict::kWait;
    verdict.reason =
        absl::StrCat("the resident share takes ", resident,
                     " bytes of device memory, the KV pool has ", pool, " beside tails");
  }
  return verdict;
}

bool Scheduler::PlacementFits(const Request& request) const {
  for (const auto& running : running_) {
    if (!running->ended() && !(running->request().placement == request.placement)) return false;
  }
  return true;
}

bool Scheduler::TryAdmit(Waiting& head, absl::Time now) {
  const Request& request = *head.request;
  const Session* const session = sessions_.Find(request.session_id);
  if (session != nullptr && session->busy) {
    const bool ending = std::any_of(running_.begin(), running_.end(), [&](const auto& running) {
      return running->ended() && running->request().session_id == request.session_id;
    });
    if (ending) return false;  // it is free within a step
    Refuse(head, SessionBusyError(request.session_id));
    return true;
  }
  if (!PlacementFits(request)) return false;
  Verdict verdict = Judge(request, session, /*alone=*/false);
  if (verdict.kind == Verdict::kWait) return false;
  if (verdict.kind == Verdict::kNever) {
    Refuse(head, NeverFitsError(verdict.reason));
    return true;
  }
  Begin(head, verdict, now);
  return true;
}

void Scheduler::Begin(Waiting& waiting, const Verdict& verdict, absl::Time now) {
  const Request& request = *waiting.request;
  Sequence sequence;
  int64_t cached_tokens = 0;
  if (!request.session_id.empty()) {
    absl::StatusOr<Session*> session = sessions_.FindOrMake(request.session_id, now);
    if (!session.ok()) {
      Refuse(waiting, NeverFitsError(session.status().message()));
      return;
    }
    cached_tokens = CachedTokensFor(request, **session);
    sequence = std::exchange((*session)->sequence, Sequence());
    (*session)->busy = true;
    (*session)->cache_salt = request.cache_salt;
    if (sequence.sealed_tokens > cached_tokens ||
        (!sequence.runs.empty() && sequence.runs.back().first_pos() >= cached_tokens)) {
      Truncate(sequence, cached_tokens);
      peers_->Truncate(sequence.id, cached_tokens);
    }
  }
  if (sequence.id == 0) sequence.id = next_sequence_id_++;
  {
    MutexLock lock(&mutex_);
    --num_waiting_;
  }
  auto running = std::make_unique<RunningRequest>(
      std::move(waiting.request), std::move(waiting.sink), std::move(waiting.decoder),
      std::move(sequence), cached_tokens);
  running->reserved_tokens = verdict.reserved_tokens;
  running->reserved_runs = verdict.reserved_runs;
  running->explanation.set_device(facts()->worker.device());
  running->Accept();
  plan_.wanted_anew = true;
  running_.push_back(std::move(running));
}

// The prompt's scores need every position computed, and keys of another salt are none of its
// business.
int64_t Scheduler::CachedTokensFor(const Request& request, const Session& session) {
  if (request.bypass_prefix_cache || request.score_prompt ||
      request.cache_salt != session.cache_salt) {
    return 0;
  }
  return CachedTokens(session.sequence, request.prompt);
}

// Deterministic: nothing is planned anew on the way.
int64_t Scheduler::FirstHorizon(const Request& request) {
  if (request.deterministic) return request.end_pos();
  return std::min(request.end_pos(), static_cast<int64_t>(request.prompt.size()) + kHorizonTokens);
}

std::vector<SequenceShape> Scheduler::RunningShapes() const {
  std::vector<SequenceShape> shapes;
  for (const auto& request : running_) {
    if (!request->ended()) {
      shapes.push_back(request->Shape(capacity_.geometry, request->horizon_tokens));
    }
  }
  return shapes;
}

// ---------------------------------------------------------------- endings

RunningRequest* Scheduler::FindRunning(uint64_t sequence_id) {
  for (auto& request : running_) {
    if (request->sequence().id == sequence_id) return request.get();
  }
  return nullptr;
}

RunningRequest* Scheduler::FindRunning(const std::string& request_id) {
  for (auto& request : running_) {
    if (request->request().id == request_id) return request.get();
  }
  return nullptr;
}

void Scheduler::ForgetId(const std::string& request_id) {
  MutexLock lock(&mutex_);
  ids_.erase(request_id);
}

// An ended request keeps its place until the worker has closed its sequence: only then may its
// extents be given to another.
void Scheduler::SweepEnded() {
  for (auto at = running_.begin(); at != running_.end();) {
    RunningRequest& request = **at;
    const bool quiet = request.ended() && request.rows_in_flight() == 0 && !request.lease_in_flight;
    if (quiet && request.open_on_worker && connected_ && !request.close_sent) {
      pipeline_.Close(request.sequence().id);
      request.close_sent = true;
    }
    if (!quiet || request.open_on_worker || !connected_) {
      ++at;
      continue;
    }
    std::unique_ptr<RunningRequest> gone = std::move(*at);
    at = running_.erase(at);
    LetGo(std::move(gone));
  }
}

void Scheduler::LetGo(std::unique_ptr<RunningRequest> request) {
  plan_.wanted_anew = true;
  const Request& what = request->request();
  ForgetId(what.id);
  LogInfo(absl::StrCat("ended: ", request->prompt_tokens(), " prompt tokens, ",
                       request->cached_tokens(), " of them cached, ", request->generated_tokens(),
                       " generated"),
          what.id);
  totals_.set_prompt_tokens(totals_.prompt_tokens() + request->prompt_tokens());
  totals_.set_generated_tokens(totals_.generated_tokens() + request->generated_tokens());
  Session* const session = what.session_id.empty() ? nullptr : sessions_.Find(what.session_id);
  if (session == nullptr || session->drop) {
    ReleaseLater(request->sequence());
    if (session != nullptr) sessions_.Erase(what.session_id);
    return;
  }
  session->sequence = std::move(request->sequence());
  session->busy = false;
  session->last_used = absl::Now();
  if (session->sequence.committed_tokens < session->sequence.sealed_tokens) {
    uncommitted_sessions_.insert(session->id);
  }
}

}  // namespace headroom::coordinator
