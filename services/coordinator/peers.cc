#include "services/coordinator/peers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/log.h"
#include "common/status.h"

namespace headroom::coordinator {
namespace {

constexpr absl::Duration kWatchInterval = absl::Seconds(1);
constexpr absl::Duration kFirstPause = absl::Milliseconds(50);
constexpr absl::Duration kLongestPause = absl::Milliseconds(250);  // a start may take so much longer
constexpr absl::Duration kLasting = absl::Seconds(1);
// Before the lane in place is opened again: a store that is too slow must not stop every step.
constexpr absl::Duration kFirstInPlacePause = absl::Milliseconds(500);
constexpr absl::Duration kLongestInPlacePause = absl::Seconds(10);
constexpr absl::Duration kInPlaceLasting = absl::Seconds(30);
constexpr int32_t kSchemaRevision = 2;

// A status with a reason was said by the peer itself.
bool IsUnreachable(const absl::Status& status) {
  return (absl::IsUnavailable(status) && ReasonOf(status).empty()) ||
         absl::IsDeadlineExceeded(status);
}

// Either side may be the older one.
template <typename Info>
absl::Status CheckRevision(const Info& info, absl::string_view who) {
  if (info.minimum_peer_revision() <= kSchemaRevision) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the ", who, " speaks with revision ", info.minimum_peer_revision(),
                   " and later, this coordinator is of revision ", kSchemaRevision));
}

}  // namespace

Peers::Peers(std::unique_ptr<WorkerClient> worker, std::unique_ptr<StoreClient> store,
             bool allow_clean, TaskThread* scheduler_thread, Events events)
    : worker_(std::move(worker)),
      store_(std::move(store)),
      allow_clean_(allow_clean),
      scheduler_thread_(scheduler_thread),
      events_(std::move(events)),
      next_pause_(kFirstPause),
      calls_(kWatchInterval, [this] { WatchStore(); }) {}

Peers::~Peers() {
  calls_.Stop();
  stream_.reset();
}

void Peers::PostIfCurrent(uint64_t epoch, TaskThread::Task task) {
  scheduler_thread_->Post([this, epoch, task = std::move(task)] {
    if (epoch == epoch_) task();
  });
}

// ---------------------------------------------------------------- connecting

void Peers::Connect() {
  const uint64_t epoch = ++epoch_;
  const bool lasted = absl::Now() - connected_at_ > kLasting;
  const absl::Duration pause = lasted ? absl::ZeroDuration() : next_pause_;
  next_pause_ = lasted ? kFirstPause : std::min(2 * next_pause_, kLongestPause);
  calls_.Post([this, epoch, pause, old = std::exchange(stream_, nullptr)]() mutable {
    old.reset();
    calls_.Pause(pause);
    ConnectUntilItWorks(epoch);
  });
}

void Peers::ConnectUntilItWorks(uint64_t epoch) {
  for (absl::Duration pause = kFirstPause; !calls_.stopping();
       pause = std::min(2 * pause, kLongestPause)) {
    absl::StatusOr<Connection> made = TryConnect(epoch);
    if (made.ok()) {
      PostIfCurrent(epoch, [this, made = *std::move(made)]() mutable {
        stream_ = std::move(made.stream);
        connected_at_ = absl::Now();
        events_.on_connected(std::move(made.found));
      });
      return;
    }
    PostIfCurrent(epoch, [this, status = made.status()] { events_.on_connect_failed(status); });
    calls_.Pause(pause);
  }
}

absl::StatusOr<Peers::Connection> Peers::TryConnect(uint64_t epoch) {
  Connection made;
  absl::StatusOr<v1::GetWorkerInfoResponse> worker = worker_->GetInfo();
  if (!worker.ok()) return Annotate(worker.status(), "worker");
  HEADROOM_RETURN_IF_ERROR(CheckRevision(*worker, "worker"));
  made.found.worker = *std::move(worker);
  if (absl::Status status = BindStore(made.found); !status.ok()) return Annotate(status, "kvstore");
  const v1::GetStoreInfoResponse& store = made.found.store;
  if (absl::Status status = worker_->AttachStore(store.segment_dir(), store.generation());
      !status.ok()) {
    return Annotate(status, "worker");
  }
  in_place_open_ = false;
  if (store.attend_threads() > 0) OpenInPlace(store.generation());
  made.found.lane_costs = LaneCostsOf(made.found);
  HEADROOM_ASSIGN_OR_RETURN(
      made.stream, worker_->StartSteps(
                       [this, epoch](v1::StepResponse response) {
                         PostIfCurrent(epoch, [this, response = std::move(response)]() mutable {
                           events_.on_response(std::move(response));
                         });
                       },
                       [this, epoch](absl::Status status) {
                         PostIfCurrent(epoch, [this, status] { events_.on_stream_lost(status); });
                       }));
  generation_ = store.generation();
  store_answers_ = true;
  restart_told_ = false;
  return made;
}

// Measured once for peers of a kind: when one of them comes back, sequences wait for it.
v1::MeasureLanesResponse Peers::LaneCostsOf(const PeersFound& found) {
  const std::string measured_for = absl::StrCat(
      found.worker.device(), ", ", found.worker.memory().budget_bytes(), " bytes, ",
      found.worker.fingerprint().value(), ", ", in_place_open_ ? found.store.attend_threads() : 0);
  if (measured_for == measured_for_) return lane_costs_;
  absl::StatusOr<v1::MeasureLanesResponse> costs = worker_->MeasureLanes();
  if (!costs.ok()) {
    LogWarning(absl::StrCat("what steps cost is not known: ", costs.status().message()));
    return {};
  }
  measured_for_ = measured_for;
  lane_costs_ = *std::move(costs);
  return lane_costs_;
}

absl::Status Peers::BindStore(PeersFound& found) {
  HEADROOM_ASSIGN_OR_RETURN(found.store, store_->GetInfo());
  HEADROOM_RETURN_IF_ERROR(CheckRevision(found.store, "kvstore"));
  const absl::Status bound =
      store_->BindModel(found.worker.geometry(), found.worker.fingerprint(), allow_clean_);
  if (ReasonOf(bound) == "OTHER_MODEL") {
    return Annotate(bound, "the coordinator's --allow-clean-segment is not set");
  }
  HEADROOM_RETURN_IF_ERROR(bound);
  HEADROOM_ASSIGN_OR_RETURN(found.stored, store_->ListSequences());
  // Binding may have changed what is used.
  HEADROOM_ASSIGN_OR_RETURN(found.store, store_->GetInfo());
  return absl::OkStatus();
}

void Peers::Send(v1::StepRequest step) {
  if (stream_ != nullptr) stream_->Send(std::move(step));
}

// ---------------------------------------------------------------- the store

void Peers::WatchStore() {
  if (generation_ == 0 || absl::Now() < next_watch_) return;
  next_watch_ = absl::Now() + kWatchInterval;
  absl::StatusOr<v1::GetStoreInfoResponse> info = store_->GetInfo();
  if (info.ok() && info->generation() != generation_ && !restart_told_) {
    restart_told_ = true;
    scheduler_thread_->Post([this] { events_.on_store_restarted(); });
  }
  store_answers_ = info.ok();
  if (info.ok() && info->generation() == generation_ && info->attend_threads() > 0 &&
      !in_place_open_ && absl::Now() >= in_place_retry_) {
    OpenInPlace(generation_);
  }
  scheduler_thread_->Post([this, info = std::move(info)] { events_.on_store(info); });
}

void Peers::OpenInPlace(uint64_t generation) {
  const absl::StatusOr<std::string> file = worker_->OpenMailbox(generation);
  const absl::Status status = file.ok() ? store_->AttachMailbox(*file) : file.status();
  if (status.ok()) {
    in_place_open_ = true;
    in_place_opened_ = absl::Now();
    LogInfo(absl::StrCat("keys in place are attended to: ", *file));
  } else {
    PauseInPlace();
    LogWarning(absl::StrCat("keys in place are fetched: ", status.message()));
  }
}

void Peers::ReopenInPlace() {
  calls_.Post([this] {
    if (!in_place_open_) return;  // told of several steps
    in_place_open_ = false;
    PauseInPlace();
  });
}

void Peers::PauseInPlace() {
  const bool lasted = absl::Now() - in_place_opened_ > kInPlaceLasting;
  in_place_pause_ = lasted ? kFirstInPlacePause
                           : std::clamp(2 * in_place_pause_, kFirstInPlacePause,
                                        kLongestInPlacePause);
  in_place_retry_ = absl::Now() + in_place_pause_;
}

void Peers::NoteStore(const absl::Status& status) {
  if (status.ok() || !store_answers_) return;
  next_watch_ = absl::Now();  // look at once
  if (!IsUnreachable(status)) return;
  store_answers_ = false;
  scheduler_thread_->Post([this, status] { events_.on_store(status); });
}

void Peers::AllocateRuns(uint64_t sequence_id, int64_t first_pos, std::vector<int64_t> capacities,
                         std::function<void(absl::Status, std::vector<v1::ExtentRun>)> done) {
  calls_.Post([this, sequence_id, first_pos, capacities = std::move(capacities),
               done = std::move(done)]() mutable {
    std::vector<v1::ExtentRun> runs;
    absl::Status status;
    for (const int64_t capacity : capacities) {
      absl::StatusOr<v1::ExtentRun> run = store_->AllocateRun(sequence_id, first_pos, capacity);
      status = run.status();
      if (!status.ok()) break;
      first_pos = run->first_pos() + run->capacity_tokens();
      runs.push_back(*std::move(run));
    }
    NoteStore(status);
    scheduler_thread_->Post([done = std::move(done), status, runs = std::move(runs)]() mutable {
      done(status, std::move(runs));
    });
  });
}

void Peers::CommitSealed(std::vector<v1::SealedSequence> sequences, Done done) {
  calls_.Post([this, sequences = std::move(sequences), done = std::move(done)] {
    const absl::Status status = store_->CommitSealed(sequences);
    NoteStore(status);
    scheduler_thread_->Post([done, status] { done(status); });
  });
}

void Peers::Truncate(uint64_t sequence_id, int64_t tokens, Done done) {
  calls_.Post([this, sequence_id, tokens, done = std::move(done)] {
    const absl::Status status = store_->TruncateSequence(sequence_id, tokens);
    NoteStore(status);
    scheduler_thread_->Post([done, status] { done(status); });
  });
}

void Peers::Release(std::vector<uint64_t> sequence_ids, Done done) {
  calls_.Post([this, sequence_ids = std::move(sequence_ids), done = std::move(done)] {
    const absl::Status status = store_->ReleaseSequences(sequence_ids);
    NoteStore(status);
    scheduler_thread_->Post([done, status] { done(status); });
  });
}

void Peers::PreparePlan(v1::Plan plan, Done done) {
  calls_.Post([this, plan = std::move(plan), done = std::move(done)] {
    absl::Status status = worker_->PreparePlan(plan);
    if (status.ok()) {
      const absl::Status at_store = store_->PreparePlan(plan);
      NoteStore(at_store);
      // A store that is away serves nothing in place; it hears of the plan when it is back.
      if (!at_store.ok() && !IsUnreachable(at_store)) status = at_store;
    }
    scheduler_thread_->Post([done, status] { done(status); });
  });
}

}  // namespace headroom::coordinator
