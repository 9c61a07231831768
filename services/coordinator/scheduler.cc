#include "services/coordinator/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "services/coordinator/errors.h"
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
    for (auto& answer : std::exchange(drained_, {})) answer();
  });
  thread_.Stop();
}

// ---------------------------------------------------------------- from clients

absl::Status Scheduler::Reserve(const std::string& request_id, int32_t answers) {
  MutexLock lock(&mutex_);
  if (draining_) return DrainingError();
  if (facts_ == nullptr) return NotReadyError("no worker and store have been found yet");
  if (answers > 1 && answers > options_.max_queue) {
    return NeverFitsError(absl::StrCat(answers, " answers are asked for, --max-queue lets ",
                                       options_.max_queue, " wait"));
  }
  if (num_waiting_ + answers > options_.max_queue) return QueueFullError(options_.max_queue);
  const auto [at, is_new] = known_.try_emplace(request_id);
  if (!is_new) return IdInUseError(request_id);
  at->second.answers_left = answers;
  num_waiting_ += answers;
  return absl::OkStatus();
}

void Scheduler::GiveUp(const std::string& request_id) {
  {
    MutexLock lock(&mutex_);
    const auto at = known_.find(request_id);
    num_waiting_ -= at->second.answers_left;
    known_.erase(at);
  }
  Wake();  // a drain may have waited for it
}

bool Scheduler::IsEnding(const std::string& request_id) const {
  MutexLock lock(&mutex_);
  return known_.at(request_id).ending.has_value();
}

absl::Status Scheduler::Submit(const Request& request, std::shared_ptr<RequestSink> sink,
                               const std::function<std::unique_ptr<TokenDecoder>()>& make_decoder) {
  const int32_t attend_threads = facts()->store.attend_threads();
  if (!request.placement.automatic && request.placement.share(Lane::kInPlace) > 0 &&
      attend_threads == 0) {
    return InPlaceNotServedError(attend_threads);
  }
  // A task must be copyable; ownership passes through a shared pointer.
  auto answers = std::make_shared<std::vector<Waiting>>();
  for (int32_t index = 0; index < request.n; ++index) {
    answers->push_back({RequestOfAnswer(request, index), sink, make_decoder()});
  }
  const bool posted = thread_.Post([this, answers] { EnqueueAnswers(std::move(*answers)); });
  return posted ? absl::OkStatus() : StoppingError();
}

void Scheduler::EnqueueAnswers(std::vector<Waiting> answers) {
  const std::string id = answers.front().request->id;
  std::optional<Ending> ending;
  {
    MutexLock lock(&mutex_);
    Known& known = known_.at(id);
    known.reserved = false;
    ending = std::move(known.ending);
  }
  for (Waiting& waiting : answers) Enqueue(std::move(waiting));
  if (ending.has_value()) EndRequest(id, ending->status, ending->reason);
}

void Scheduler::EndLater(const std::string& request_id, const absl::Status& status,
                         v1::FinishReason reason) {
  {
    MutexLock lock(&mutex_);
    const auto at = known_.find(request_id);
    if (at == known_.end()) return;
    if (at->second.reserved) {
      at->second.ending = {status, reason};
      return;
    }
  }
  thread_.Post([=, this] { EndRequest(request_id, status, reason); });
}

void Scheduler::Cancel(const std::string& request_id) {
  EndLater(request_id, ClientGoneError(), v1::FINISH_REASON_UNSPECIFIED);
}

void Scheduler::Abort(const std::string& request_id) {
  EndLater(request_id, absl::OkStatus(), v1::FINISH_REASON_CANCELLED);
}

void Scheduler::Wake() {
  thread_.Post([] {});
}

std::shared_ptr<const PeerFacts> Scheduler::facts() const {
  MutexLock lock(&mutex_);
  return facts_;
}

// ---------------------------------------------------------------- the queue

void Scheduler::Refuse(Waiting& waiting, const absl::Status& status, v1::FinishReason reason) {
  ForgetId(waiting.request->id);
  {
    MutexLock lock(&mutex_);
    --num_waiting_;
  }
  v1::Finished finished;
  finished.set_index(waiting.request->index);
  finished.set_seed(waiting.request->sampling.seed());
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
  // What can never fit is refused at once, not when its turn comes; of peers that are not there, once they are.
  if (connected_ && RefuseIfItNeverFits(waiting)) return;
  queue_.push_back(std::move(waiting));
}

// ---------------------------------------------------------------- the loop

void Scheduler::Tick() {
  const absl::Time now = absl::Now();
  ExpireRequests(now);
  MaintainReattachment();
  SweepEnded();
  MaintainReleases();
  AdmitFromQueue(now);
  MaintainTruncations();
  MaintainLeases();
  MaintainPlan();
  UpdateMayRun(now);
  if (connected_ && !reattach_ && plan_.ready_version != 0) {
    pipeline_.Pump(running_, plan_.ready_version);
  }
  MaintainCommits();
  MaintainSessions(now);
  UpdateServing();
  if (!drained_.empty() && Drained()) {
    for (auto& answer : std::exchange(drained_, {})) answer();
  }
}

bool Scheduler::Drained() const {
  const bool over = std::all_of(running_.begin(), running_.end(),
                                [&](const auto& request) { return !connected_ && request->ended(); });
  MutexLock lock(&mutex_);
  return over && queue_.empty() &&
         std::none_of(known_.begin(), known_.end(),
                      [](const auto& request) { return request.second.reserved; });
}

void Scheduler::ExpireRequests(absl::Time now) {
  const bool lost = !connected_ && now - disconnected_since_ > options_.lost_peer_timeout;
  const bool store_lost = now - store_away_since_ > options_.lost_peer_timeout;
  // The reason to end now, or nothing.
  const auto over = [&](const Request& request) -> std::optional<absl::Status> {
    if (now >= request.deadline) return DeadlinePassedError();
    if (lost) return PeerLostError(now - disconnected_since_, connect_failure_);
    if (now - request.arrival >= request.time_limit) return absl::OkStatus();
    return std::nullopt;
  };
  for (auto at = queue_.begin(); at != queue_.end();) {
    std::optional<absl::Status> status = over(*at->request);
    // Without the store nothing is released that the queue may be waiting for.
    if (!status.has_value() && store_lost && now - at->request->arrival > options_.lost_peer_timeout) {
      status = PeerLostError(now - store_away_since_, connect_failure_);
    }
    if (status.has_value()) Refuse(*at, *status, v1::FINISH_REASON_TIME_LIMIT);
    at = status.has_value() ? queue_.erase(at) : at + 1;
  }
  for (auto& request : running_) {
    std::optional<absl::Status> status = over(request->request());
    // Whoever has extents enough goes on without the store.
    if (!status.has_value() && store_lost && request->rows_in_flight() == 0 &&
        (!request->leased || LacksExtents(*request))) {
      status = PeerLostError(now - store_away_since_, connect_failure_);
    }
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
    request->set_may_run(takes && !request->ended() && !request->taking_back() && request->leased &&
                         request->plan_version != 0 &&
                         request->plan_version <= plan_.ready_version);
  }
}

// ---------------------------------------------------------------- endings

RunningRequest* Scheduler::FindRunning(uint64_t sequence_id) {
  for (auto& request : running_) {
    if (request->sequence().id == sequence_id) return request.get();
  }
  return nullptr;
}

void Scheduler::EndRequest(const std::string& request_id, const absl::Status& status,
                           v1::FinishReason reason) {
  for (auto at = queue_.begin(); at != queue_.end();) {
    const bool wanted = at->request->id == request_id;
    if (wanted) Refuse(*at, status, reason);
    at = wanted ? queue_.erase(at) : at + 1;
  }
  for (auto& request : running_) {
    if (request->request().id == request_id) request->End(status, reason);
  }
}

void Scheduler::ForgetId(const std::string& request_id) {
  MutexLock lock(&mutex_);
  const auto at = known_.find(request_id);
  if (at != known_.end() && --at->second.answers_left == 0) known_.erase(at);
}

// An ended request keeps its place until the worker has closed its sequence: only then may its
// extents be given to another.
void Scheduler::SweepEnded() {
  for (auto at = running_.begin(); at != running_.end();) {
    RunningRequest& request = **at;
    if (request.ended() && !request.id_forgotten) {
      ForgetId(request.request().id);
      request.id_forgotten = true;
    }
    // Tokens are there soon; a long prompt's chunk may take seconds.
    if (request.ended() && request.chunk_in_flight() && connected_ && worker_abandons_ &&
        !request.abandon_sent) {
      pipeline_.Abandon(request.sequence().id);
      request.abandon_sent = true;
    }
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
