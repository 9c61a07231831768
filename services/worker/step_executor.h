// Runs steps on a device: the layer loop (step_completion.cc has the completion thread).
//
// Threads. One executor thread enqueues everything (Device streams are fed by one thread); one
// completion thread waits for steps to end and hands them back, in the order in which they end: steps
// that share a sequence in order of their numbers. Callers of Submit() and the others only pass
// messages. Steps with a chunk run in the prefill context, steps of single tokens in the decode
// context; the executor takes turns between them at layer borders: one whole decode step, then one
// layer of the chunk, which is never enqueued more than two layers ahead of the device.
//
// Steady decode allocates nothing on the executor, completion and stream threads.
#ifndef HEADROOM_SERVICES_WORKER_STEP_EXECUTOR_H_
#define HEADROOM_SERVICES_WORKER_STEP_EXECUTOR_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/bounded_queue.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "services/worker/device_budget.h"
#include "services/worker/discarded_steps.h"
#include "services/worker/gpu_kv.h"
#include "services/worker/in_place_lane.h"
#include "services/worker/model/decoder.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"
#include "services/worker/step.h"
#include "services/worker/step_context.h"
#include "services/worker/step_layers.h"

namespace headroom {

struct StepExecutorOptions {
  int32_t max_sequences = 16;
  // A step that takes longer than this fails: every wait has a deadline.
  absl::Duration step_timeout = absl::Minutes(10);
  // What the kvstore has for one layer's keys in place.
  absl::Duration in_place_deadline = absl::Seconds(1);
};

class StepExecutor {
 public:
  // Called on the completion thread with the step and its result; takes the step over.
  using DoneCallback = std::function<void(std::unique_ptr<Step>)>;

  // `device`, `config` and `weights` outlive the executor.
  static absl::StatusOr<std::unique_ptr<StepExecutor>> Create(Device& device,
                                                              const ModelConfig& config,
                                                              const ModelWeights& weights,
                                                              const DeviceBudget& budget,
                                                              const StepExecutorOptions& options,
                                                              DoneCallback done);
  // Waits for what is in flight.
  ~StepExecutor();

  // Keeps a plan for steps to name. INVALID_ARGUMENT if its ranges do not cover each KV head of each
  // layer from position 0 on exactly once.
  absl::Status PreparePlan(Plan plan);
  // Replaces the mapped segment between steps. All sequences must be opened anew.
  absl::Status AttachSegment(const SegmentView& segment);
  // Where keys in place are asked for; null: they are fetched. Sequences stay; steps that have been
  // submitted and not begun wait for it.
  absl::Status SetMailbox(std::shared_ptr<Mailbox> mailbox);
  // Drops every sequence, after what is in flight.
  absl::Status CloseAll();
  // RESOURCE_EXHAUSTED if more steps wait than the protocol allows.
  absl::Status Submit(std::unique_ptr<Step> step);
  // Nobody wants what the sequences have in flight: StepRequest.abandon_sequence_ids. Their steps end with
  // CANCELLED and `retry`.
  void Abandon(const std::vector<uint64_t>& sequence_ids);

  struct Memory {
    int64_t kv_pool_bytes = 0;
    int64_t kv_pool_high_water_bytes = 0;
    int64_t kv_pool_used_bytes = 0;  // when the latest step began
    ArenaUse arena;
  };
  Memory memory() const;

 private:
  static constexpr size_t kMaxWaitingSteps = 8;

  // One context and what it has begun.
  struct Context {
    std::unique_ptr<StepContext> state;
    BoundedQueue<std::unique_ptr<Step>, kMaxWaitingSteps> waiting;  // executor thread only
    int next_flight = 0;                        // executor thread only
    int32_t next_layer = -1;                    // of the step being enqueued; -1: none
    int active_flight = 0;
    EventId layer_done[2];                      // by layer parity
    bool sealed_once = false;                   // whether state->all_sealed was ever recorded
    bool flight_busy[kStepsInFlight] = {};      // guarded by mutex_
    int64_t last_done_ns = 0;                   // completion thread only
  };

  StepExecutor(Device& device, const ModelConfig& config, const DeviceBudget& budget,
               const StepExecutorOptions& options, DoneCallback done);
  absl::Status Init(const ModelWeights& weights);

  // ---- Executor thread.
  void ExecutorLoop();
  void TakeInbox();
  bool NothingBegun() const;
  bool Idle() const;
  // Begins the context's next step if it may; true if it did.
  bool TryBegin(Context& context);
  // Nobody wants the step whose layers are being enqueued.
  bool Abandoned(const Context& context) const;
  bool MayBegin(const Context& context, const Step& step) const;
  absl::Status Begin(Context& context, std::unique_ptr<Step> step, int flight);
  absl::Status ApplyMembership(const Step& step);
  absl::Status FillDrawState(const Step& step, StepContext::Flight& flight);
  absl::Status ApplyPlan(uint64_t version);
  absl::Status OrderAfterEarlierSteps();
  absl::Status EnqueuePromotions();
  // One layer of the context's step, and what comes before the first and after the last.
  void EnqueueNextLayer(Context& context);
  absl::Status EnqueueLayer(Context& context, int32_t layer);
  absl::Status EnqueueEnd(Context& context);
  absl::Status RecordSealed(Context& context);
  void Finish(Context& context, const absl::Status& status);
  bool MayEnqueueAhead(Context& context);
  // What an errand runs after: the steps that have begun, or all that have been submitted.
  enum class After { kAllBegun, kAllSubmitted };
  absl::Status RunBetweenSteps(After after, std::function<absl::Status()> work);

  // ---- Completion thread.
  void CompletionLoop();
  absl::Status JudgeAwaits(StepContext::Flight& flight);
  // The step of a flight that has run, with its result.
  std::unique_ptr<Step> Complete(StepContext::Flight& flight, int64_t begun_ns);

  Device& device_;
  const ModelConfig& config_;
  const DeviceBudget budget_;
  const StepExecutorOptions options_;
  const DoneCallback done_;

  StreamId compute_;
  StreamId copy_;
  StreamId seal_;
  EventId barriers_[3];
  std::unique_ptr<GpuKv> kv_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<InPlaceLane> in_place_;
  std::unique_ptr<StepLayers> layers_;
  std::unique_ptr<uint8_t[]> staging_;
  int64_t staging_bytes_ = 0;
  Context prefill_;
  Context decode_;
  // Executor thread only.
  Plan plan_;                   // in force
  bool runs_changed_ = false;   // since the plan was last applied
  std::vector<CopyArgs> promotions_;  // new resident copies to be filled
  EventId promoted_;

  mutable Mutex mutex_;
  CondVar work_;      // inbox, stop, or a flight has ended
  CondVar enqueued_;  // running_ is not empty, or stop
  BoundedQueue<std::unique_ptr<Step>, kMaxWaitingSteps> inbox_ ABSL_GUARDED_BY(mutex_);
  // Steps that are enqueued, in the order of their ends on the compute stream.
  struct Running {
    Context* context = nullptr;
    int flight = 0;
  };
  BoundedQueue<Running, kNumContexts * kStepsInFlight> running_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, Plan> plans_ ABSL_GUARDED_BY(mutex_);
  struct Errand {
    After after;
    std::function<absl::Status()> work;
    absl::Status status;
    bool done = false;
  };
  Errand* errand_ ABSL_GUARDED_BY(mutex_) = nullptr;
  CondVar errand_done_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool executor_ended_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t events_ ABSL_GUARDED_BY(mutex_) = 0;  // counts whatever may let the executor go on
  DiscardedSteps discarded_ ABSL_GUARDED_BY(mutex_);
  int64_t kv_pool_high_water_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t kv_pool_used_ ABSL_GUARDED_BY(mutex_) = 0;

  std::thread executor_;
  std::thread completion_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_EXECUTOR_H_
