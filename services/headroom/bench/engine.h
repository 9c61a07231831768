// A device, a model and an executor without services around them: what the bench measures.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_ENGINE_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_ENGINE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "services/headroom/bench/bench_segment.h"
#include "services/headroom/bench/prefill_probe.h"
#include "services/headroom/bench/work_item.h"
#include "services/kvstore/attend_pool.h"
#include "services/worker/decode_probe.h"
#include "services/worker/device_budget.h"
#include "services/worker/lane_calibration.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"
#include "services/worker/step_executor.h"

namespace headroom {

struct EngineOptions {
  std::string model_dir;
  std::string random_weights;  // a config.json whose weights are drawn; then there is no model_dir
  std::string geometry;        // likewise a name (geometries.h)
  uint64_t seed = 0;           // draws them
  std::string device;          // as in DeviceOptions
  int32_t threads = 1;
  // 0: the weights and 2 GiB on the CPU device, all that it gives on a GPU.
  int64_t gpu_memory_bytes = 0;
  int64_t beside_bytes = 0;  // of the arena, not of gpu_memory_bytes: for the ceilings' probe
  int64_t least_segment_bytes = 0;  // of host memory: likewise
  int64_t chunk_tokens = 0;
};

absl::StatusOr<ModelConfig> ConfigOf(const EngineOptions& options);

// One measurement: sums over the prefill's steps, or means over the window's; beside a prefill, means
// over the decode's steps.
struct Measurement : StepTimes {
  // Of the prefill; of one decode step (mean over a window of steps); beside a prefill, between two
  // tokens, 99 of 100 times (p99).
  double seconds = 0;
  double cpu_seconds = 0;  // of the whole process
  double predicted_seconds = 0;  // of a planned decode step, right before it ran
  int64_t prefilled_tokens = 0;  // of the prefill: fewer than asked for if it was cut off
  double prefill_seconds = 0;
  std::vector<double> token_seconds;  // beside a prefill: between tokens, sorted
  int64_t kv_pool_used_bytes = 0;  // at its end, when it holds the most
};

// Driven by one thread.
class BenchEngine {
 public:
  // Keys and values of whatever `items` need are laid out once, finite and random, in the background:
  // an item waits for what it needs. Errors as those of the model's parts; UNAVAILABLE for a device that
  // is not there.
  static absl::StatusOr<std::unique_ptr<BenchEngine>> Create(const EngineOptions& options,
                                                             ModelConfig config,
                                                             const std::vector<WorkItem>& items);
  ~BenchEngine();

  // No chunk of a prefill begins after `deadline`, but for the first. `on_chunk` may be empty.
  // FAILED_PRECONDITION if the device's memory does not hold what should be resident.
  absl::StatusOr<Measurement> Measure(const WorkItem& item, absl::Time deadline,
                                      const OnChunk& on_chunk);

  // The first bytes of the segment: as many as least_segment_bytes are there. What lies in them matters to no item, but
  // must be finite bfloat16 numbers.
  absl::StatusOr<uint8_t*> AwaitSegment(int64_t bytes);

  // What the planner balances with, as of now. Takes some seconds.
  absl::StatusOr<LaneCosts> Calibrate();
  // How a planned item is placed in this device's memory, and what is predicted of it.
  struct Planned {
    double step_seconds = 0;
    double lane_bytes[kNumLanes] = {};
  };
  absl::StatusOr<Planned> PlanFor(const WorkItem& item);

  // Steps of a decode measurement, and the mean context over them.
  static int WarmSteps(const WorkItem& item) { return item.once ? 2 : 4; }
  static int MeasuredSteps(const WorkItem& item) {
    return item.kind == WorkItem::Kind::kQuestion ? 1 : item.once ? 6 : 32;
  }
  static double MeanDecodeContext(const WorkItem& item) {
    if (item.kind == WorkItem::Kind::kBeside) return kBesideContextTokens;
    return static_cast<double>(item.context_tokens) + WarmSteps(item) +
           (MeasuredSteps(item) + 1) / 2.0;
  }
  int64_t PrefillChunkTokens() const;

  const ModelConfig& config() const { return config_; }
  const DeviceBudget& budget() const { return budget_; }
  Device& device() const { return *device_; }
  StepExecutor::Memory memory() const { return executor_->memory(); }

 private:
  // Steps that have run, from the executor's threads to the bench's.
  class DoneQueue {
   public:
    void Put(std::unique_ptr<Step> step);
    absl::StatusOr<std::unique_ptr<Step>> Take();

   private:
    Mutex mutex_;
    CondVar put_;
    std::deque<std::unique_ptr<Step>> steps_ ABSL_GUARDED_BY(mutex_);
  };

  explicit BenchEngine(ModelConfig config) : config_(std::move(config)) {}
  absl::Status Init(const EngineOptions& options, const std::vector<WorkItem>& items);
  absl::Status MapSegment(const std::vector<WorkItem>& items, const EngineOptions& options);
  absl::Status OpenInPlace(int32_t threads);
  // Extents for `tokens` positions of a sequence, from byte `used_bytes` of the segment on.
  OpenSequence Layout(uint64_t id, int64_t tokens, int64_t& used_bytes) const;

  // Where the extents of positions [0, tokens) end in the segment.
  int64_t EndOfRuns(const std::vector<Run>& runs, int64_t tokens) const;

  // With the decode beside it if `item` says so.
  absl::StatusOr<Measurement> MeasurePrefill(const WorkItem& item, absl::Time deadline,
                                             const OnChunk& on_chunk);
  StepPort Port();
  absl::StatusOr<Measurement> MeasureDecode(const WorkItem& item);
  // The step that takes a question in, of the sequence that MeasureDecode() has left.
  absl::StatusOr<Measurement> MeasureQuestion(const WorkItem& item);
  uint64_t PlanVersion(const WorkItem& item) const;
  absl::Status CheckResident(const WorkItem& item, const Measurement& measurement) const;

  std::unique_ptr<Device> device_;
  const ModelConfig config_;
  ModelWeights weights_;
  DeviceBudget budget_;
  std::unique_ptr<BenchSegment> segment_;
  std::unique_ptr<kvstore::AttendPool> pool_;
  int64_t chunk_tokens_ = 0;
  uint64_t planned_version_ = 1000;  // of the latest planned item
  uint64_t next_step_ = 1;
  uint64_t next_sequence_ = 1;
  DoneQueue done_;
  std::unique_ptr<StepExecutor> executor_;  // last: its threads use the rest
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_ENGINE_H_
