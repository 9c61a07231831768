#include "services/worker/step_executor.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "common/steady_time.h"
#include "common/trace.h"
#include "services/worker/draw_state.h"

namespace headroom {
namespace {

constexpr size_t kMaxPlans = 16;

absl::Status AbandonedError() {
  return absl::CancelledError("a sequence of the step is abandoned");
}

bool SharesSequence(const Step& a, const Step& b) {
  for (const StepSequence& one : a.sequences) {
    for (const StepSequence& other : b.sequences) {
      if (one.sequence_id == other.sequence_id) return true;
    }
  }
  return false;
}

}  // namespace

// ---------------------------------------------------------------- construction

absl::StatusOr<std::unique_ptr<StepExecutor>> StepExecutor::Create(
    Device& device, const ModelConfig& config, const ModelWeights& weights,
    const DeviceBudget& budget, const StepExecutorOptions& options, DoneCallback done) {
  auto executor = std::unique_ptr<StepExecutor>(
      new StepExecutor(device, config, budget, options, std::move(done)));
  HEADROOM_RETURN_IF_ERROR(executor->Init(weights));
  return executor;
}

StepExecutor::StepExecutor(Device& device, const ModelConfig& config, const DeviceBudget& budget,
                           const StepExecutorOptions& options, DoneCallback done)
    : device_(device),
      config_(config),
      budget_(budget),
      options_(options),
      done_(std::move(done)) {}

absl::Status StepExecutor::Init(const ModelWeights& weights) {
  HEADROOM_ASSIGN_OR_RETURN(compute_, device_.CreateStream("compute"));
  HEADROOM_ASSIGN_OR_RETURN(copy_, device_.CreateStream("copy"));
  HEADROOM_ASSIGN_OR_RETURN(seal_, device_.CreateStream("seal"));
  for (EventId& event : barriers_) {
    HEADROOM_ASSIGN_OR_RETURN(event, device_.CreateEvent());
  }
  HEADROOM_ASSIGN_OR_RETURN(promoted_, device_.CreateEvent());
  HEADROOM_ASSIGN_OR_RETURN(Decoder decoder,
                            Decoder::Create(device_, compute_, config_, weights, budget_));
  decoder_ = std::make_unique<Decoder>(std::move(decoder));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const ring, device_.Allocate(budget_.ring_bytes, "ring"));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const pool,
                            device_.Allocate(budget_.kv_pool_bytes, "KV pool"));
  kv_ = std::make_unique<GpuKv>(config_.kv_geometry(), pool, budget_.kv_pool_bytes,
                                std::min(options_.max_sequences, Decoder::kMaxSequences),
                                budget_.draw_state_bytes, config_.windows);
  in_place_ = std::make_unique<InPlaceLane>(device_, config_, options_.in_place_deadline);
  layers_ = std::make_unique<StepLayers>(device_, config_, *decoder_, *in_place_, compute_, seal_);
  staging_bytes_ = kNumContexts * StepContext::StagingBytes(budget_);
  staging_ = std::make_unique<uint8_t[]>(staging_bytes_);
  HEADROOM_RETURN_IF_ERROR(device_.RegisterHost(staging_.get(), staging_bytes_));
  const int64_t part = budget_.ring_bytes / kNumContexts;
  Context* const contexts[kNumContexts] = {&prefill_, &decode_};
  for (int i = 0; i < kNumContexts; ++i) {
    HEADROOM_ASSIGN_OR_RETURN(
        std::unique_ptr<FetchPipeline> pipeline,
        FetchPipeline::Create(device_, copy_, compute_, *kv_, ring + i * part, part));
    const bool chunks = contexts[i] == &prefill_;
    HEADROOM_ASSIGN_OR_RETURN(
        contexts[i]->state,
        StepContext::Create(device_, config_, budget_,
                            chunks ? budget_.max_chunk_tokens : kMaxDecodeRows, chunks, *kv_,
                            *in_place_, static_cast<uint32_t>(i), std::move(pipeline),
                            staging_.get() + i * StepContext::StagingBytes(budget_)));
    for (EventId& event : contexts[i]->layer_done) {
      HEADROOM_ASSIGN_OR_RETURN(event, device_.CreateEvent());
    }
  }
  executor_ = std::thread([this] { ExecutorLoop(); });
  completion_ = std::thread([this] { CompletionLoop(); });
  return absl::OkStatus();
}

StepExecutor::~StepExecutor() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    ++events_;
    work_.SignalAll();
    enqueued_.SignalAll();
  }
  if (executor_.joinable()) executor_.join();
  if (completion_.joinable()) completion_.join();
  in_place_.reset();
  if (staging_ != nullptr) device_.UnregisterHost(staging_.get()).IgnoreError();
}

// ---------------------------------------------------------------- messages

absl::Status StepExecutor::PreparePlan(Plan plan) {
  HEADROOM_RETURN_IF_ERROR(ValidatePlan(plan, config_.num_layers, config_.num_kv_heads));
  MutexLock lock(&mutex_);
  while (plans_.size() >= kMaxPlans) plans_.erase(plans_.begin());
  plans_[plan.version] = std::move(plan);
  return absl::OkStatus();
}

absl::Status StepExecutor::Submit(std::unique_ptr<Step> step) {
  // Here, so that the completion thread need not allocate.
  int64_t results = 0;
  for (const StepSequence& sequence : step->sequences) results += sequence.num_results();
  step->result.tokens.reserve(std::min(results, kMaxResults));
  MutexLock lock(&mutex_);
  if (inbox_.full()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("step ", step->number, ": ", inbox_.size(), " steps wait already"));
  }
  inbox_.push_back(std::move(step));
  ++events_;
  work_.Signal();
  return absl::OkStatus();
}

absl::Status StepExecutor::AttachSegment(const SegmentView& segment) {
  return RunBetweenSteps(After::kAllSubmitted, [this, segment] {
    kv_->CloseAll();
    discarded_.Clear();  // RunBetweenSteps() holds the lock
    kv_->SetSegment(segment);
    return absl::OkStatus();
  });
}

absl::Status StepExecutor::SetMailbox(std::shared_ptr<Mailbox> mailbox) {
  return RunBetweenSteps(After::kAllBegun, [this, mailbox = std::move(mailbox)] {
    return in_place_->SetMailbox(mailbox);
  });
}

absl::Status StepExecutor::CloseAll() {
  return RunBetweenSteps(After::kAllSubmitted, [this] {
    kv_->CloseAll();
    discarded_.Clear();  // RunBetweenSteps() holds the lock
    return absl::OkStatus();
  });
}

void StepExecutor::Abandon(const std::vector<uint64_t>& sequence_ids) {
  MutexLock lock(&mutex_);
  discarded_.Abandon(sequence_ids);
  ++events_;
  work_.Signal();
}

absl::Status StepExecutor::RunBetweenSteps(After after, std::function<absl::Status()> work) {
  Errand errand{after, std::move(work), absl::OkStatus(), false};
  MutexLock lock(&mutex_);
  const absl::Time deadline = absl::Now() + options_.step_timeout;
  while (errand_ != nullptr && absl::Now() < deadline) {
    errand_done_.WaitFor(&mutex_, absl::Seconds(1));
  }
  if (errand_ != nullptr || stop_) return absl::UnavailableError("the executor does not respond");
  errand_ = &errand;
  ++events_;
  work_.Signal();
  while (!errand.done && !stop_) errand_done_.WaitFor(&mutex_, absl::Seconds(1));
  errand_ = nullptr;
  errand_done_.SignalAll();
  return errand.done ? errand.status : absl::UnavailableError("the executor is stopping");
}

StepExecutor::Memory StepExecutor::memory() const {
  MutexLock lock(&mutex_);
  return {kv_->pool().capacity_bytes(), kv_pool_high_water_, kv_pool_used_, device_.arena_use()};
}

// ---------------------------------------------------------------- the executor's loop

void StepExecutor::ExecutorLoop() {
  pthread_setname_np(pthread_self(), "executor");
  for (;;) {
    TakeInbox();
    uint64_t seen;
    bool may_begin = true;
    {
      MutexLock lock(&mutex_);
      seen = events_;
      const bool errand = errand_ != nullptr && !errand_->done;
      may_begin = !errand || errand_->after == After::kAllSubmitted;
      if (errand && running_.empty() && (may_begin ? Idle() : NothingBegun())) {
        errand_->status = errand_->work();
        errand_->done = true;
        errand_done_.SignalAll();
        continue;
      }
      if (stop_ && NothingBegun()) {
        executor_ended_ = true;
        enqueued_.SignalAll();
        return;
      }
    }
    // One whole decode step, then one layer of the chunk.
    bool progress = may_begin && TryBegin(decode_);
    while (decode_.next_layer >= 0) EnqueueNextLayer(decode_);
    progress = (may_begin && TryBegin(prefill_)) || progress;
    if (prefill_.next_layer >= 0) {
      if (Abandoned(prefill_)) {
        Finish(prefill_, AbandonedError());
      } else if (MayEnqueueAhead(prefill_)) {
        EnqueueNextLayer(prefill_);
      }
      progress = true;  // MayEnqueueAhead() has waited
    }
    if (progress) continue;
    MutexLock lock(&mutex_);
    if (events_ == seen) work_.WaitFor(&mutex_, absl::Seconds(1));
  }
}

void StepExecutor::TakeInbox() {
  MutexLock lock(&mutex_);
  while (!inbox_.empty()) {
    Context& context = inbox_.front()->has_chunk() ? prefill_ : decode_;
    if (context.waiting.full()) return;
    context.waiting.push_back(inbox_.pop_front());
  }
}

bool StepExecutor::NothingBegun() const {
  return prefill_.next_layer < 0 && decode_.next_layer < 0;
}

bool StepExecutor::Idle() const {
  return NothingBegun() && prefill_.waiting.empty() && decode_.waiting.empty();
}

bool StepExecutor::Abandoned(const Context& context) const {
  MutexLock lock(&mutex_);
  return discarded_.AllAbandoned(*context.state->flight(context.active_flight).step);
}

// A step must not overtake one that it depends on, nor pull memory from under one whose layers are
// still being enqueued.
bool StepExecutor::MayBegin(const Context& context, const Step& step) const {
  const Context& other = &context == &prefill_ ? decode_ : prefill_;
  if (context.next_layer >= 0) return false;
  for (size_t i = 0; i < other.waiting.size(); ++i) {
    const Step& earlier = *other.waiting[i];
    if (earlier.number >= step.number) continue;
    if (!earlier.open.empty() || !earlier.close.empty() || !earlier.grants.empty() ||
        earlier.plan_version != plan_.version || SharesSequence(earlier, step)) {
      return false;
    }
  }
  if (other.next_layer < 0) return true;
  if (!step.open.empty() || !step.close.empty() || step.plan_version != plan_.version) return false;
  return !SharesSequence(*other.state->flight(other.active_flight).step, step);
}

bool StepExecutor::TryBegin(Context& context) {
  if (context.waiting.empty() || !MayBegin(context, *context.waiting.front())) return false;
  const int flight = context.next_flight;
  {
    MutexLock lock(&mutex_);
    if (context.flight_busy[flight]) return false;
    context.flight_busy[flight] = true;
  }
  std::unique_ptr<Step> step = context.waiting.pop_front();
  context.next_flight = (flight + 1) % kStepsInFlight;
  context.active_flight = flight;
  StepContext::Flight& at = context.state->flight(flight);
  at.num_results = 0;
  absl::Status status = Begin(context, std::move(step), flight);
  if (!status.ok() || at.step->sequences.empty()) {
    at.num_results = 0;
    Finish(context, status);
  }
  return true;
}

absl::Status StepExecutor::Begin(Context& context, std::unique_ptr<Step> step, int flight) {
  const TraceScope trace("begin step", "step", static_cast<int64_t>(step->number));
  StepContext& state = *context.state;
  StepContext::Flight& at = state.flight(flight);
  at.enqueued_ns = SteadyNs();
  at.seals = false;
  at.status = absl::OkStatus();
  at.step = std::move(step);
  const Step& s = *at.step;
  HEADROOM_RETURN_IF_ERROR(ApplyMembership(s));
  HEADROOM_RETURN_IF_ERROR(FillDrawState(s, at));
  if (s.sequences.empty()) return absl::OkStatus();
  {
    MutexLock lock(&mutex_);
    if (!discarded_.MayRun(s)) return AbandonedError();
  }
  if (runs_changed_ || s.plan_version != plan_.version ||
      (NothingBegun() && kv_->WindowsMoved())) {
    HEADROOM_RETURN_IF_ERROR(ApplyPlan(s.plan_version));
  }
  HEADROOM_RETURN_IF_ERROR(OrderAfterEarlierSteps());
  HEADROOM_RETURN_IF_ERROR(EnqueuePromotions());
  HEADROOM_RETURN_IF_ERROR(state.BeginStep(std::move(at.step), plan_, flight));
  HEADROOM_RETURN_IF_ERROR(at.tables.Upload(device_, compute_));
  HEADROOM_RETURN_IF_ERROR(state.pipeline().Advance());
  HEADROOM_RETURN_IF_ERROR(
      decoder_->Begin(state.tokens(), state.positions(), state.x(), state.cos_sin()));
  context.next_layer = 0;
  return absl::OkStatus();
}

absl::Status StepExecutor::ApplyMembership(const Step& step) {
  const auto has_history = [](const OpenSequence& open) { return open.history.has_value(); };
  if (std::count_if(step.open.begin(), step.open.end(), has_history) > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("step ", step.number, " opens more than one sequence with a history"));
  }
  for (const OpenSequence& open : step.open) {
    if (open.history.has_value()) {
      HEADROOM_RETURN_IF_ERROR(CheckHistory(*open.history, config_.vocab));
    }
  }
  for (const uint64_t id : step.close) kv_->Close(id);
  if (!step.close.empty()) {
    MutexLock lock(&mutex_);
    discarded_.Close(step.close);
  }
  runs_changed_ = runs_changed_ || !step.open.empty() || !step.grants.empty();
  const bool repeated = step.attempt > 0;
  for (const OpenSequence& open : step.open) {
    if (repeated && kv_->Holds(open)) continue;
    HEADROOM_RETURN_IF_ERROR(kv_->Open(open));
  }
  for (const RunGrant& grant : step.grants) {
    if (repeated && kv_->Holds(grant)) continue;
    HEADROOM_RETURN_IF_ERROR(kv_->Grant(grant));
  }
  return absl::OkStatus();
}

// From the flight's own staging memory: nothing else is written there before the step has run.
absl::Status StepExecutor::FillDrawState(const Step& step, StepContext::Flight& flight) {
  for (const OpenSequence& open : step.open) {
    if (!open.history.has_value()) continue;
    GpuKv::Sequence& sequence = *kv_->Find(open.sequence_id);
    if (sequence.draw_state == nullptr || sequence.draw_state_filled) continue;  // a repeated step
    HEADROOM_RETURN_IF_ERROR(OrderAfterEarlierSteps());
    WriteDrawState(*open.history, config_.vocab, flight.draw_state);
    CopyArgs copy;
    copy.dst = sequence.draw_state;
    copy.src = flight.draw_state;
    copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes =
        kernels::DrawStateBytes(config_.vocab);
    HEADROOM_RETURN_IF_ERROR(device_.Copy(compute_, copy));
    sequence.draw_state_filled = true;
    sequence.counted_tokens = open.history->known_tokens;
  }
  return absl::OkStatus();
}

absl::Status StepExecutor::ApplyPlan(uint64_t version) {
  if (version != plan_.version) {
    MutexLock lock(&mutex_);
    const auto found = plans_.find(version);
    if (found == plans_.end()) {
      return absl::FailedPreconditionError(absl::StrCat("plan ", version, " was not prepared"));
    }
    plan_ = found->second;
  }
  runs_changed_ = false;
  const auto promote = [this](const GpuKv::Sequence& sequence, int run, int32_t layer,
                              int32_t kv_head) {
    const kernels::KvSpan to = kv_->Resident(sequence, run, layer, kv_head);
    const kernels::KvSpan from = kv_->Extent(sequence, run, layer);
    const KvLayout layout{to.capacity, config_.head_dim};
    const int64_t rows = std::min<int64_t>(sequence.sealed_tokens - to.first_pos, to.capacity);
    if (rows <= 0) return;
    CopyArgs copy;
    copy.dst = to.base;
    copy.src = from.base + layout.KeyOffset(kv_head, 0);
    copy.dst_pitch_bytes = copy.src_pitch_bytes = layout.HeadBytes() / 2;
    copy.width_bytes = rows * layout.RowBytes();
    copy.height = 2;
    promotions_.push_back(copy);
  };
  kv_->ApplyPlan(plan_, promote, /*drop_behind=*/NothingBegun());
  MutexLock lock(&mutex_);
  kv_pool_high_water_ = kv_->pool().high_water_bytes();
  kv_pool_used_ = kv_->pool().used_bytes();
  return absl::OkStatus();
}

// What earlier steps sealed is read, and memory that sequences and copies have given up is reused,
// only after the work that was enqueued with it.
absl::Status StepExecutor::OrderAfterEarlierSteps() {
  for (Context* sealer : {&prefill_, &decode_}) {
    if (!sealer->sealed_once) continue;
    HEADROOM_RETURN_IF_ERROR(device_.Wait(compute_, sealer->state->all_sealed));
    HEADROOM_RETURN_IF_ERROR(device_.Wait(copy_, sealer->state->all_sealed));
  }
  if (!kv_->TakeFreed()) return absl::OkStatus();
  const StreamId streams[] = {compute_, copy_, seal_};
  for (int i = 0; i < 3; ++i) HEADROOM_RETURN_IF_ERROR(device_.Record(streams[i], barriers_[i]));
  for (const StreamId stream : streams) {
    for (const EventId barrier : barriers_) HEADROOM_RETURN_IF_ERROR(device_.Wait(stream, barrier));
  }
  return absl::OkStatus();
}

absl::Status StepExecutor::EnqueuePromotions() {
  if (promotions_.empty()) return absl::OkStatus();
  for (const CopyArgs& copy : promotions_) HEADROOM_RETURN_IF_ERROR(device_.Copy(copy_, copy));
  promotions_.clear();
  HEADROOM_RETURN_IF_ERROR(device_.Record(copy_, promoted_));
  // Sealing into the copies waits for the compute stream anyway.
  return device_.Wait(compute_, promoted_);
}

// ---------------------------------------------------------------- one layer after the other

// A chunk's layer takes long (27 ms on two CPU cores, 30 ms on a GPU at 128K): at most two are
// enqueued, so that a decode step that arrives now runs after them.
bool StepExecutor::MayEnqueueAhead(Context& context) {
  if (context.next_layer < 2) return true;
  return device_.Synchronize(context.layer_done[context.next_layer % 2], absl::Milliseconds(2)).ok() ||
         !device_.status().ok();
}

void StepExecutor::EnqueueNextLayer(Context& context) {
  const int32_t layer = context.next_layer;
  absl::Status status = EnqueueLayer(context, layer);
  if (status.ok() && layer + 1 < config_.num_layers) {
    context.next_layer = layer + 1;
    return;
  }
  if (status.ok()) status = EnqueueEnd(context);
  Finish(context, status);
}

absl::Status StepExecutor::EnqueueLayer(Context& context, int32_t layer) {
  const bool whole = &context == &decode_;
  HEADROOM_RETURN_IF_ERROR(
      layers_->Enqueue(*context.state, context.state->flight(context.active_flight), layer, whole));
  // MayEnqueueAhead() wants to know. Between a GPU's kernels events keep the next one from starting early.
  return whole ? absl::OkStatus() : device_.Record(compute_, context.layer_done[layer % 2]);
}

absl::Status StepExecutor::EnqueueEnd(Context& context) {
  StepContext& state = *context.state;
  StepContext::Flight& flight = state.flight(context.active_flight);
  HEADROOM_RETURN_IF_ERROR(layers_->EnqueueResults(state, flight));
  if (flight.seals) HEADROOM_RETURN_IF_ERROR(RecordSealed(context));
  state.Commit();
  return absl::OkStatus();
}

absl::Status StepExecutor::RecordSealed(Context& context) {
  context.sealed_once = true;
  HEADROOM_RETURN_IF_ERROR(
      device_.Record(seal_, context.state->flight(context.active_flight).sealed_done));
  return device_.Record(seal_, context.state->all_sealed);
}

void StepExecutor::Finish(Context& context, const absl::Status& status) {
  StepContext::Flight& flight = context.state->flight(context.active_flight);
  flight.status = status;
  if (!status.ok()) {
    // What it has enqueued still runs: nothing of it may be reused before.
    context.state->pipeline().Abandon().IgnoreError();
    flight.num_results = 0;
    flight.seals = context.next_layer >= 0 && RecordSealed(context).ok();
  }
  if (absl::Status recorded = device_.Record(compute_, flight.done); !recorded.ok()) {
    flight.status = recorded;
  }
  context.next_layer = -1;
  MutexLock lock(&mutex_);
  if (absl::IsCancelled(flight.status)) {
    discarded_.Discard(*flight.step, /*run=*/false);
    flight.step->result.retry = true;
  }
  running_.push_back({&context, context.active_flight});
  enqueued_.SignalAll();
}

}  // namespace headroom
