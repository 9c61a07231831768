// The scheduler's dealings with worker and store: what they report, and what is asked of them
// beside the steps: leases, commits, releases.
#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/log.h"
#include "common/status.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/lease.h"
#include "services/coordinator/plan_proto.h"
#include "services/coordinator/scheduler.h"

namespace headroom::coordinator {
namespace {

// How long steps in flight may hold up the re-attachment of a store.
constexpr absl::Duration kReattachPatience = absl::Seconds(30);
constexpr int kMaxLeaseFailures = 3;
constexpr int32_t kRevisionThatAbandons = 2;

}  // namespace

Peers::Events Scheduler::MakeEvents() {
  Peers::Events events;
  events.on_connected = [this](PeersFound found) { OnConnected(std::move(found)); };
  events.on_response = [this](v1::StepResponse response) { OnResponse(response); };
  events.on_stream_lost = [this](absl::Status status) { Disconnect(status); };
  events.on_store = [this](absl::StatusOr<v1::GetStoreInfoResponse> info) { OnStore(info); };
  events.on_store_restarted = [this] {
    LogWarning("the kvstore has been started anew: it is attached when no step is in flight");
    reattach_ = true;
    reattach_since_ = absl::Now();
  };
  events.on_connect_failed = [this](absl::Status status) {
    if (connect_failure_ != status.message())
      LogWarning(absl::StrCat("connecting: ", status.message()));
    connect_failure_ = std::string(status.message());
  };
  return events;
}

// ---------------------------------------------------------------- connections

void Scheduler::OnConnected(PeersFound found) {
  LogInfo(absl::StrCat("connected: worker ", found.worker.device(), ", kvstore generation ",
                       found.store.generation(), " with ", found.stored.size(), " sequences"));
  const v1::GetWorkerInfoResponse& worker = found.worker;
  capacity_.extents = {FromProto(worker.geometry()),
                       {worker.layer_windows().begin(), worker.layer_windows().end()},
                       worker.max_chunk_tokens()};
  capacity_.host_bytes = static_cast<int64_t>(found.store.capacity_bytes());
  capacity_.max_extents = found.store.max_extents();
  capacity_.kv_pool_bytes = worker.memory().kv_pool_bytes();
  capacity_.tail_bytes_per_sequence = worker.memory().tail_bytes_per_sequence();
  capacity_.draw_state_bytes = worker.memory().draw_state_bytes_per_sequence();
  capacity_.max_sequences = std::min(worker.max_sequences(), worker.max_decode_rows());
  pipeline_.set_limits({worker.max_chunk_tokens(), worker.max_decode_rows(), worker.max_results()});
  // Asked for before the store was attached; what is registered since then NoteWorker() has told.
  const int64_t registered = device_memory_.registered_host_bytes();
  device_memory_ = worker.memory();
  device_memory_.set_registered_host_bytes(registered);
  LaneCosts costs = FromProto(found.lane_costs);
  if (found.store.attend_threads() == 0) costs.seconds_per_byte[static_cast<int>(Lane::kInPlace)] = 0;
  step_model_.Reset(costs);
  in_place_exact_ = worker.device() == "cpu";
  worker_abandons_ = worker.schema_revision() >= kRevisionThatAbandons;
  pipeline_.Reset();
  truncations_.clear();  // sequences are now as the store has them
  ReconcileWithStore(found.stored);
  for (auto& request : running_) {
    request->Restart();
    if (!CanGoOnFrom(request->sequence(), capacity_.extents.windows,
                     request->progress().next_pos)) {
      // The store came back with less than was given back behind windows allows for.
      TruncateAtStore(request->sequence().id, 0);
      Reconcile(request->sequence(), nullptr);
      request->Restart();
    }
    request->leased = false;
    request->lease_retry = absl::InfinitePast();
  }
  plan_.ready_version = 0;
  plan_.wanted_anew = true;
  connected_ = true;
  reattach_ = false;
  store_answers_ = true;
  store_away_since_ = absl::InfiniteFuture();
  ++connections_;
  connect_failure_.clear();
  // What came meanwhile has not been judged, and the worker may have come back with less memory.
  for (auto at = queue_.begin(); at != queue_.end();) {
    at = RefuseIfItNeverFits(*at) ? queue_.erase(at) : at + 1;
  }
  auto facts = std::make_shared<PeerFacts>();
  facts->worker = std::move(found.worker);
  facts->store = std::move(found.store);
  MutexLock lock(&mutex_);
  facts_ = std::move(facts);
}

void Scheduler::ReconcileWithStore(const std::vector<v1::StoredSequence>& stored) {
  std::map<uint64_t, const v1::StoredSequence*> by_id;
  for (const v1::StoredSequence& sequence : stored) {
    by_id[sequence.sequence_id()] = &sequence;
    next_sequence_id_ = std::max(next_sequence_id_, sequence.sequence_id() + 1);
  }
  const auto reconcile = [&](Sequence& sequence) {
    const auto at = by_id.find(sequence.id);
    Reconcile(sequence, at == by_id.end() ? nullptr : at->second);
    if (at != by_id.end()) by_id.erase(at);
  };
  for (auto& request : running_) reconcile(request->sequence());
  sessions_.ForEach([&](Session& session) {
    if (session.busy) return;
    reconcile(session.sequence);
    if (session.sequence.committed_tokens < session.sequence.sealed_tokens) {
      uncommitted_sessions_.insert(session.id);
    }
  });
  // What nobody here knows is what a release that failed, or an earlier coordinator, has left.
  for (const auto& [id, sequence] : by_id) {
    Sequence unknown;
    unknown.id = id;
    unknown.runs.assign(sequence->runs().begin(), sequence->runs().end());
    ReleaseLater(unknown);
  }
}

void Scheduler::Disconnect(const absl::Status& why) {
  if (connected_) {
    LogWarning(absl::StrCat("steps cannot go on: ", why.message()));
    disconnected_since_ = absl::Now();
    connect_failure_ = std::string(why.message());
  }
  connected_ = false;
  pipeline_.Reset();
  peers_->Connect();
}

bool Scheduler::IsFenced(const absl::Status& from_store, uint64_t connection) {
  if (!IsOvertaken(from_store)) return false;
  if (connected_ && connection == connections_) {
    Disconnect(Annotate(from_store, "the kvstore has been bound by another coordinator"));
  }
  return true;
}

void Scheduler::OnResponse(const v1::StepResponse& response) {
  if (!connected_) return;
  StepPipeline::Returned returned = pipeline_.Receive(response, absl::Now());
  if (response.has_memory()) device_memory_ = response.memory();
  if (returned.retry && !returned.abandoned) {
    LogWarning(absl::StrCat("step ", response.number(), " is run again: ", response.message()));
    totals_.set_retried_steps(totals_.retried_steps() + 1);
    peers_->ReopenInPlace();
  }
  if (!returned.status.ok()) {
    for (RunningRequest* const request : returned.failed) {
      if (!request->CountFailure()) {
        request->End(StepFailedError(returned.status), v1::FINISH_REASON_UNSPECIFIED);
      }
    }
    Disconnect(returned.status);
    return;
  }
  ObserveStep(response);
  for (const v1::LaneUse& use : response.lanes()) {
    auto& lanes = *totals_.mutable_lanes();
    auto at = std::find_if(lanes.begin(), lanes.end(),
                           [&](const v1::LaneUse& other) { return other.lane() == use.lane(); });
    v1::LaneUse* const total = at == lanes.end() ? lanes.Add() : &*at;
    total->set_lane(use.lane());
    total->set_kv_heads(use.kv_heads());
    total->set_bytes(total->bytes() + use.bytes());
    total->set_busy_ns(total->busy_ns() + use.busy_ns());
    total->set_idle_ns(total->idle_ns() + use.idle_ns());
  }
  for (const uint64_t id : returned.closed) {
    RunningRequest* const request = FindRunning(id);
    if (request != nullptr) request->open_on_worker = false;
  }
}

void Scheduler::OnStore(const absl::StatusOr<v1::GetStoreInfoResponse>& info) {
  if (info.ok() != store_answers_) {
    LogWarning(info.ok() ? "the kvstore answers again"
                         : absl::StrCat("the kvstore does not answer: ", info.status().message()));
  }
  store_answers_ = info.ok();
  if (!info.ok()) {
    store_away_since_ = std::min(store_away_since_, absl::Now());
    connect_failure_ = std::string(info.status().message());
    return;
  }
  store_away_since_ = absl::InfiniteFuture();
  MutexLock lock(&mutex_);
  if (facts_ == nullptr || facts_->store.generation() != info->generation()) return;
  auto facts = std::make_shared<PeerFacts>(*facts_);
  facts->store = *info;
  facts_ = std::move(facts);
}

// Steps go on while the store is away; once it is back, the worker must be told, and it closes all
// sequences for that.
void Scheduler::MaintainReattachment() {
  if (!connected_ || !reattach_) return;
  if (!pipeline_.idle() && absl::Now() - reattach_since_ < kReattachPatience) return;
  Disconnect(absl::UnavailableError("the kvstore has been started anew"));
}

void Scheduler::UpdateServing() {
  const bool serving = connected_ && store_answers_;
  if (std::exchange(serving_, serving) != serving) on_serving_(serving);
}

// ---------------------------------------------------------------- the store's side of sequences

std::vector<int64_t> Scheduler::LeasesNeeded(const RunningRequest& request) const {
  const SequenceProgress& progress = request.progress();
  std::vector<int64_t> capacities;
  int64_t have = request.sequence().capacity_tokens();
  const int64_t from = LeaseFrom(capacity_.extents, std::max(progress.known_tokens, progress.next_pos),
                                 progress.committed_tokens);
  for (int64_t more; (more = NextLeaseTokens(capacity_.extents, have, from, progress.end_pos,
                                             request.reserved_tokens)) > 0;
       have += more) {
    capacities.push_back(more);
  }
  return capacities;
}

bool Scheduler::LacksExtents(const RunningRequest& request) const {
  const SequenceProgress& progress = request.progress();
  return NextLeaseTokens(capacity_.extents, request.sequence().capacity_tokens(),
                         std::max(progress.known_tokens, progress.next_pos), progress.end_pos,
                         request.reserved_tokens) > 0;
}

void Scheduler::TruncateAtStore(uint64_t sequence_id, int64_t tokens) {
  const auto [at, is_new] = truncations_.try_emplace(sequence_id, tokens);
  if (!is_new) at->second = std::min(at->second, tokens);
}

void Scheduler::MaintainTruncations() {
  if (!connected_ || !store_answers_ || reattach_ || truncation_in_flight_ || truncations_.empty() ||
      absl::Now() < truncation_retry_) {
    return;
  }
  truncation_in_flight_ = true;
  const auto [id, tokens] = *truncations_.begin();
  peers_->Truncate(id, tokens, [=, this, connection = connections_](const absl::Status& status) {
    truncation_in_flight_ = false;
    if (connection == connections_ && !IsFenced(status, connection)) OnTruncated(id, tokens, status);
  });
}

void Scheduler::OnTruncated(uint64_t sequence_id, int64_t tokens, const absl::Status& status) {
  // A store may have been started anew a moment ago and know no model yet.
  if (MayPassAway(status) || reattach_ || ReasonOf(status) == "NO_MODEL_BOUND") {
    truncation_retry_ = absl::Now() + kRetryInterval;
    return;
  }
  const auto at = truncations_.find(sequence_id);
  if (at != truncations_.end() && at->second == tokens) truncations_.erase(at);
  if (status.ok() || absl::IsNotFound(status)) return;
  LogWarning(absl::StrCat("truncating sequence ", sequence_id, ": ", status.message()));
  if (RunningRequest* const request = FindRunning(sequence_id)) {
    request->End(StoreRefusedError(status), v1::FINISH_REASON_UNSPECIFIED);
    if (Session* const session = sessions_.Find(request->request().session_id)) session->drop = true;
    return;
  }
  if (Session* const session = sessions_.FindIdle(sequence_id)) {
    ReleaseLater(session->sequence);
    sessions_.Erase(std::string(session->id));
  }
}

void Scheduler::MaintainLeases() {
  if (!connected_ || !store_answers_) return;
  for (auto& request : running_) {
    const Sequence& sequence = request->sequence();
    if (request->ended() || request->lease_in_flight || absl::Now() < request->lease_retry ||
        truncations_.contains(sequence.id)) {
      continue;
    }
    std::vector<int64_t> capacities = LeasesNeeded(*request);
    if (capacities.empty()) {
      request->leased = true;
      continue;
    }
    request->lease_in_flight = true;
    peers_->AllocateRuns(sequence.id, sequence.capacity_tokens(), std::move(capacities),
                         [this, id = sequence.id, connection = connections_](
                             absl::Status status, std::vector<v1::ExtentRun> runs) {
                           OnLeased(id, connection, status, std::move(runs));
                         });
  }
}

void Scheduler::OnLeased(uint64_t sequence_id, uint64_t connection, const absl::Status& status,
                         std::vector<v1::ExtentRun> runs) {
  RunningRequest* const request = FindRunning(sequence_id);
  if (request == nullptr) return;
  request->lease_in_flight = false;
  for (v1::ExtentRun& run : runs) {
    // After a reconnection the sequence may have fewer runs than the call supposed.
    if (run.first_pos() == request->sequence().capacity_tokens()) request->AddRun(std::move(run));
  }
  if (status.ok()) {
    request->lease_failures = 0;
    return;
  }
  if (IsFenced(status, connection)) return;
  // Beside being full, a store may have been started anew a moment ago and know no model yet.
  request->lease_retry = absl::Now() + kRetryInterval;
  if (MayPassAway(status) || connection != connections_ || reattach_) return;
  if (absl::IsResourceExhausted(status) || ++request->lease_failures >= kMaxLeaseFailures) {
    request->End(LeaseFailedError(status), v1::FINISH_REASON_UNSPECIFIED);
  }
}

void Scheduler::MaintainCommits() {
  if (!connected_ || !store_answers_ || reattach_ || commit_in_flight_ ||
      absl::Now() < commit_retry_) {
    return;
  }
  std::vector<v1::SealedSequence> sealed;
  // Vacated here before the store has done it: whoever looks for a prefix meanwhile must not count on it.
  const auto add = [&](Sequence& sequence) {
    if (sequence.sealed_tokens <= sequence.committed_tokens || truncations_.contains(sequence.id)) return;
    sealed.push_back(
        TakeSealed(sequence, capacity_.extents.geometry, capacity_.extents.windows));
  };
  for (const auto& request : running_) add(request->sequence());
  std::set<std::string> sessions = std::exchange(uncommitted_sessions_, {});
  for (const std::string& id : sessions) {
    Session* const session = sessions_.Find(id);
    if (session == nullptr || session->busy) continue;
    if (truncations_.contains(session->sequence.id)) uncommitted_sessions_.insert(id);
    add(session->sequence);
  }
  if (sealed.empty()) return;
  commit_in_flight_ = true;
  peers_->CommitSealed(
      sealed, [this, sealed, sessions, connection = connections_](const absl::Status& status) {
        commit_in_flight_ = false;
        if (!status.ok()) {
          uncommitted_sessions_.insert(sessions.begin(), sessions.end());
          if (!IsFenced(status, connection) && !MayPassAway(status)) {
            LogWarning(absl::StrCat("committing: ", status.message()));
          }
          commit_retry_ = absl::Now() + kRetryInterval;
        } else if (connection == connections_) {  // else counts have been set anew since
          OnCommitted(sealed, sessions);
        }
      });
}

void Scheduler::OnCommitted(const std::vector<v1::SealedSequence>& sealed,
                            const std::set<std::string>& sessions) {
  for (const v1::SealedSequence& what : sealed) {
    if (RunningRequest* const request = FindRunning(what.sequence_id())) {
      request->Committed(what.sealed_tokens());
    }
  }
  for (const std::string& id : sessions) {
    Session* const session = sessions_.Find(id);
    if (session == nullptr || session->busy) continue;
    for (const v1::SealedSequence& what : sealed) {
      if (what.sequence_id() != session->sequence.id) continue;
      session->sequence.committed_tokens =
          std::min(what.sealed_tokens(), session->sequence.sealed_tokens);
    }
  }
}

void Scheduler::MaintainReleases() {
  if (!connected_ || !store_answers_ || release_in_flight_ || to_release_.sequence_ids.empty() ||
      absl::Now() < release_retry_) {
    return;
  }
  release_in_flight_ = true;
  in_release_ = std::exchange(to_release_, {});
  peers_->Release(in_release_.sequence_ids, [this, connection = connections_](const absl::Status& status) {
    release_in_flight_ = false;
    Leaving released = std::exchange(in_release_, {});
    if (status.ok()) return;
    IsFenced(status, connection);
    LogWarning(
        absl::StrCat("releasing ", released.sequence_ids.size(), " sequences: ", status.message()));
    released.sequence_ids.insert(released.sequence_ids.end(), to_release_.sequence_ids.begin(),
                                 to_release_.sequence_ids.end());
    released.host_bytes += to_release_.host_bytes;
    released.runs += to_release_.runs;
    to_release_ = std::move(released);
    release_retry_ = absl::Now() + kRetryInterval;
  });
}

}  // namespace headroom::coordinator
