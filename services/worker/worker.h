// One device with one model's weights, the mapped segment, and the executor over both. No RPC here:
// worker_service.h has the messages.
//
// Threads. Create() loads and may take long. The constant facts may be read anywhere. AttachStore(),
// OpenMailbox(), BeginStream() and EndStream() block until the steps in flight have ended and are called by one thread
// at a time; PreparePlan() and Submit() are thread-safe.
#ifndef HEADROOM_SERVICES_WORKER_WORKER_H_
#define HEADROOM_SERVICES_WORKER_WORKER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "services/worker/device_budget.h"
#include "services/worker/lane_calibration.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"
#include "services/worker/registered_segment.h"
#include "services/worker/step.h"
#include "services/worker/step_executor.h"
#include "services/worker/worker_server.h"

namespace headroom {

class Worker {
 public:
  // Takes a step that has run, on a thread of the executor; must not block.
  using StepSink = std::function<void(std::unique_ptr<Step>)>;

  // What Create() would refuse without a driver and the weights: options, config.json, and whether
  // --gpu-memory is enough where it is known.
  static absl::Status CheckFlags(const WorkerOptions& options);
  // Makes the device and loads the weights, with progress in the log. Errors as StartWorker().
  static absl::StatusOr<std::unique_ptr<Worker>> Create(const WorkerOptions& options);
  ~Worker();

  // ---- Constant after Create().
  absl::string_view device_name() const { return device_->name(); }
  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  const DeviceBudget& budget() const { return budget_; }
  int32_t max_sequences() const { return max_sequences_; }
  uint64_t incarnation() const { return incarnation_; }

  // Plans of libraries when all was ready for steps; more than these stall some step.
  int64_t plans_at_start() const { return plans_at_start_; }

  // Thread-safe.
  StepExecutor::Memory memory() const { return executor_->memory(); }
  int64_t plans_built() const { return device_->plans_built(); }
  // Of the attached segment, bytes that the device may name by now.
  int64_t registered_host_bytes() const;

  // Maps the segment of a store and registers what is ready of it with the device, the rest in the
  // background. Nothing to do if this generation is attached. All sequences are closed. Returns the
  // bytes registered so far. Errors as MappedSegment::Open().
  absl::StatusOr<int64_t> AttachStore(const std::string& segment_dir, uint64_t generation);

  // Makes a mailbox for the attached store and returns its file's name; the one there is, if no wait on
  // it has given up. FAILED_PRECONDITION if another generation is attached, RESOURCE_EXHAUSTED if the
  // segment's folder is full.
  absl::StatusOr<std::string> OpenMailbox(uint64_t generation);

  // What decode steps cost with the attached store: measured by running some, or as it was measured for
  // the same store and mailbox. FAILED_PRECONDITION without a store or during a stream.
  absl::StatusOr<LaneCosts> MeasureLanes();

  // INVALID_ARGUMENT. Ranges in place are attended as fetched where no store attends to them: the same
  // bytes, on the device.
  absl::Status PreparePlan(Plan plan) { return executor_->PreparePlan(std::move(plan)); }

  // From now on results go to `sink`, and no sequence is open: what earlier streams had in flight has
  // ended and is forgotten.
  absl::Status BeginStream(StepSink sink);
  absl::Status EndStream() { return BeginStream(nullptr); }
  // FAILED_PRECONDITION without a store; RESOURCE_EXHAUSTED if more steps wait than the protocol
  // allows. Nothing of an error reaches the sink.
  absl::Status Submit(std::unique_ptr<Step> step);
  // Thread-safe. Their steps in flight end early, with CANCELLED and `retry`; StepRequest says which.
  void Abandon(const std::vector<uint64_t>& sequence_ids) { executor_->Abandon(sequence_ids); }

 private:
  Worker() = default;
  absl::Status Init(const WorkerOptions& options);
  absl::Status PrepareSteps(const WorkerOptions& options, WeightLoading& loading);
  void OnDone(std::unique_ptr<Step> step);
  absl::StatusOr<std::unique_ptr<Step>> TakeMeasured();

  // Constant after Create().
  std::unique_ptr<Device> device_;
  ModelConfig config_;
  ModelWeights weights_;
  DeviceBudget budget_;
  int32_t max_sequences_ = 0;
  uint64_t incarnation_ = 0;
  int64_t plans_at_start_ = 0;
  std::function<void(const absl::Status&)> on_device_lost_;

  mutable Mutex mutex_;
  uint64_t stream_ ABSL_GUARDED_BY(mutex_) = 0;  // number of the stream that steps belong to
  std::shared_ptr<const StepSink> sink_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<RegisteredSegment> segment_ ABSL_GUARDED_BY(mutex_);
  std::string segment_dir_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<Mailbox> mailbox_ ABSL_GUARDED_BY(mutex_);  // the executor has it too
  std::string mailbox_file_ ABSL_GUARDED_BY(mutex_);
  uint64_t mailboxes_ ABSL_GUARDED_BY(mutex_) = 0;  // made so far
  std::string measured_for_ ABSL_GUARDED_BY(mutex_);  // the mailbox that lane_costs_ hold for
  LaneCosts lane_costs_ ABSL_GUARDED_BY(mutex_);
  bool measuring_ ABSL_GUARDED_BY(mutex_) = false;  // steps that end go to measured_
  CondVar measured_one_;
  std::deque<std::unique_ptr<Step>> measured_ ABSL_GUARDED_BY(mutex_);

  std::unique_ptr<StepExecutor> executor_;  // last: its threads use the rest
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_WORKER_H_
