// Who may begin, and under which plan.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "common/status.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/placement/predict.h"
#include "services/coordinator/plan_proto.h"
#include "services/coordinator/scheduler.h"

namespace headroom::coordinator {
namespace {

// A plan is made anew this many tokens before a sequence outgrows it.
constexpr int64_t kHorizonMargin = 256;

}  // namespace

// ---------------------------------------------------------------- admission

void Scheduler::AdmitFromQueue(absl::Time now) {
  while (connected_ && !reattach_ && !queue_.empty() && TryAdmit(queue_.front(), now)) {
    queue_.pop_front();
  }
}

Commitments Scheduler::CommitmentsBeside(bool alone) const {
  Commitments commitments;
  commitments.idle_bytes = sessions_.idle_bytes(capacity_.extents.geometry);
  commitments.idle_runs = sessions_.idle_runs();
  if (alone) return commitments;
  commitments.running_bytes = to_release_.host_bytes + in_release_.host_bytes;
  commitments.running_runs = to_release_.runs + in_release_.runs;
  for (const auto& running : running_) {
    commitments.running_bytes += running->reserved_bytes;
    commitments.running_runs += running->reserved_runs;
    ++commitments.running_sequences;
    if (running->request().has_history()) ++commitments.running_histories;
  }
  return commitments;
}

Verdict Scheduler::Judge(const Request& request, const Session* session, bool alone) const {
  Commitments commitments = CommitmentsBeside(alone);
  Demand demand;
  demand.final_tokens = request.end_pos();
  demand.has_history = request.has_history();
  if (session != nullptr && !session->busy) {
    // What the session has is given up or taken over; it is counted once.
    commitments.idle_bytes -= HostBytes(session->sequence, capacity_.extents.geometry);
    commitments.idle_runs -= static_cast<int64_t>(session->sequence.runs.size());
    const int64_t cached = CachedTokensFor(request, *session);
    for (const v1::ExtentRun& run : session->sequence.runs) {
      if (run.first_pos() >= cached) break;
      demand.kept_tokens = run.first_pos() + run.capacity_tokens();
      ++demand.kept_runs;
    }
  }
  Verdict verdict = Admit(capacity_, commitments, demand);
  if (verdict.kind != Verdict::kAdmit || request.placement.automatic) return verdict;
  return JudgeShares(request, alone, std::move(verdict));
}

// Shares are taken at their word: resident keys must fit beside all tails.
Verdict Scheduler::JudgeShares(const Request& request, bool alone, Verdict verdict) const {
  std::vector<SequenceShape> shapes;
  if (!alone) shapes = RunningShapes();
  shapes.push_back(ForeseenShape(capacity_.extents, static_cast<int64_t>(request.prompt.size()),
                                 FirstHorizon(request)));
  const Commitments beside = CommitmentsBeside(alone);
  const int64_t pool =
      capacity_.kv_pool_bytes -
      PoolBytes(capacity_, static_cast<int64_t>(shapes.size()),
                beside.running_histories + (request.has_history() ? 1 : 0));
  const int64_t resident = ResidentBytes(
      capacity_.extents.geometry,
      PlaceByShares(capacity_.extents.geometry, request.placement, shapes), shapes,
      capacity_.extents.windows);
  if (resident <= pool) return verdict;
  verdict.kind = alone ? Verdict::kNever : Verdict::kWait;
  verdict.reason = absl::StrCat("the resident share takes ", resident,
                                " bytes of device memory, the KV pool has ", pool,
                                " beside tails and histories");
  return verdict;
}

bool Scheduler::PlacementFits(const Request& request) const {
  for (const auto& running : running_) {
    if (!running->ended() && !(running->request().placement == request.placement)) return false;
  }
  return true;
}

bool Scheduler::RefuseIfItNeverFits(Waiting& waiting) {
  const Request& request = *waiting.request;
  const Verdict verdict = Judge(request, sessions_.Find(request.session_id), /*alone=*/true);
  if (verdict.kind != Verdict::kNever) return false;
  Refuse(waiting, NeverFitsError(verdict.reason));
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

absl::StatusOr<Sequence> Scheduler::TakeSequence(const Request& request, absl::Time now,
                                                 int64_t* cached_tokens) {
  Sequence sequence;
  *cached_tokens = 0;
  if (!request.session_id.empty()) {
    HEADROOM_ASSIGN_OR_RETURN(Session* const session,
                              sessions_.FindOrMake(request.session_id, now));
    *cached_tokens = CachedTokensFor(request, *session);
    sequence = std::exchange(session->sequence, Sequence());
    session->busy = true;
    session->cache_salt = request.cache_salt;
    if (sequence.sealed_tokens > *cached_tokens ||
        (!sequence.runs.empty() && sequence.runs.back().first_pos() >= *cached_tokens)) {
      Truncate(sequence, *cached_tokens);
      TruncateAtStore(sequence.id, *cached_tokens);
    }
  }
  if (sequence.id == 0) sequence.id = next_sequence_id_++;
  return sequence;
}

void Scheduler::Begin(Waiting& waiting, const Verdict& verdict, absl::Time now) {
  int64_t cached_tokens = 0;
  absl::StatusOr<Sequence> sequence = TakeSequence(*waiting.request, now, &cached_tokens);
  if (!sequence.ok()) {
    Refuse(waiting, NeverFitsError(sequence.status().message()));
    return;
  }
  {
    MutexLock lock(&mutex_);
    --num_waiting_;
  }
  auto running = std::make_unique<RunningRequest>(
      std::move(waiting.request), std::move(waiting.sink), std::move(waiting.decoder),
      *std::move(sequence), cached_tokens);
  running->reserved_tokens = verdict.reserved_tokens;
  running->reserved_bytes = verdict.reserved_bytes;
  running->reserved_runs = verdict.reserved_runs;
  running->explanation.set_device(facts()->worker.device());
  running->Accept();
  plan_.wanted_anew = true;
  running_.push_back(std::move(running));
}

// The prompt's scores need every position computed, and keys of another salt are none of its
// business.
int64_t Scheduler::CachedTokensFor(const Request& request, const Session& session) const {
  if (request.bypass_prefix_cache || request.score_prompt ||
      request.cache_salt != session.cache_salt) {
    return 0;
  }
  return CachedTokens(session.sequence, request.prompt, capacity_.extents.windows);
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
      shapes.push_back(request->Shape(capacity_.extents, request->horizon_tokens));
    }
  }
  return shapes;
}

// ---------------------------------------------------------------- the plan

int64_t Scheduler::HorizonOf(const RunningRequest& request) const {
  const SequenceProgress& progress = request.progress();
  // Deterministic: nothing is planned anew on the way.
  if (request.request().deterministic) return progress.end_pos;
  return std::min(progress.end_pos, progress.known_tokens + kHorizonTokens);
}

// Whether the running requests want another plan than the one in force was made for.
bool Scheduler::PlanOutgrown() const {
  if (plan_.ready_version == 0 || plan_.wanted_anew) return true;
  return std::any_of(running_.begin(), running_.end(), [](const auto& request) {
    const SequenceProgress& progress = request->progress();
    const bool outgrown = request->horizon_tokens < progress.end_pos &&
                          progress.known_tokens + kHorizonMargin > request->horizon_tokens;
    return !request->ended() && (request->plan_version == 0 || outgrown);
  });
}

void Scheduler::MaintainPlan() {
  const auto first = std::find_if(running_.begin(), running_.end(),
                                  [](const auto& request) { return !request->ended(); });
  if (!connected_ || plan_.preparing || first == running_.end() || !PlanOutgrown()) return;
  plan_.wanted_anew = false;
  // Under a deterministic request shares stay as they are; who joins takes them as they are.
  const bool frozen =
      !plan_.placement.layers.empty() &&
      std::any_of(running_.begin(), running_.end(), [](const auto& request) {
        return !request->ended() && request->request().deterministic && request->plan_version != 0;
      });
  for (auto& request : running_) {
    if (!frozen || request->plan_version == 0) request->horizon_tokens = HorizonOf(*request);
  }
  Placement placement = frozen ? plan_.placement : PlaceRunning((*first)->request().placement);
  if (plan_.ready_version != plan_.version || placement != plan_.placement) {
    ++plan_.version;
    plan_.placement = std::move(placement);
    plan_.preparing = true;
    peers_->PreparePlan(
        ToProto(plan_.placement, plan_.version),
        [this, version = plan_.version, connection = connections_](const absl::Status& status) {
          OnPlanPrepared(version, connection, status);
        });
  }
  for (auto& request : running_) {
    if (request->plan_version == 0) request->plan_version = plan_.version;
    request->explanation.set_plan_version(plan_.version);
  }
}

Placement Scheduler::PlaceRunning(const PlacementSpec& spec) const {
  const std::vector<SequenceShape> shapes = RunningShapes();
  const KvGeometry& geometry = capacity_.extents.geometry;
  if (!spec.automatic) return PlaceByShares(geometry, spec, shapes);
  const int64_t tails = PoolBytes(capacity_, static_cast<int64_t>(running_.size()),
                                  CommitmentsBeside(/*alone=*/false).running_histories);
  LaneCosts costs = step_model_.costs();
  // Beside a GPU, keys in place give other bits than on it, and how many are in place is measured, and
  // another matter when the store comes back from a fault: not what a deterministic request asks for.
  const bool bits_count =
      !in_place_exact_ && std::any_of(running_.begin(), running_.end(), [](const auto& request) {
        return !request->ended() && request->request().deterministic;
      });
  if (bits_count) costs.seconds_per_byte[static_cast<int>(Lane::kInPlace)] = 0;
  return PlaceByBudget(geometry, capacity_.kv_pool_bytes - tails, costs, shapes,
                       capacity_.extents.windows);
}

// Steps of one row tell how fast the lanes are now; the plan follows when that is worth it.
void Scheduler::ObserveStep(const v1::StepResponse& response) {
  LaneBytes bytes = {}, busy = {};
  for (const v1::LaneUse& use : response.lanes()) {
    const int lane = static_cast<int>(use.lane()) - 1;
    if (lane < 0 || lane >= kNumLanes) continue;
    bytes[lane] = static_cast<double>(use.bytes());
    busy[lane] = 1e-9 * static_cast<double>(use.busy_ns());
  }
  const bool one_row = response.results_size() == 1 && response.results(0).scored_size() == 0 &&
                       response.results(0).has_token() && response.sealed_bytes() == 0;
  if (!one_row) return;
  step_model_.Observe(bytes, busy);
  const bool automatic = std::all_of(running_.begin(), running_.end(), [](const auto& request) {
    return request->ended() || request->request().placement.automatic;
  });
  if (automatic && step_model_.WantsAnotherShare(bytes)) plan_.wanted_anew = true;
}

void Scheduler::OnPlanPrepared(uint64_t version, uint64_t connection, const absl::Status& status) {
  plan_.preparing = false;
  if (connection != connections_) return;  // asked for anew since
  if (status.ok()) {
    plan_.ready_version = version;
    return;
  }
  LogWarning(absl::StrCat("preparing plan ", version, ": ", status.message()));
  plan_.wanted_anew = true;
  if (MayPassAway(status)) return;
  // A plan that is refused would be refused again: those that wait for it cannot run.
  for (auto& request : running_) {
    if (request->plan_version >= version) {
      request->End(status, v1::FINISH_REASON_UNSPECIFIED);
    }
  }
}

}  // namespace headroom::coordinator
