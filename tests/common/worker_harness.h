// A step executor on a CPU device (or what HEADROOM_TEST_DEVICE names) with a random model, driven the
// way the coordinator drives it: prompts in chunks, tokens drawn two steps deep, extents granted as
// sequences grow. Plain memory stands for the segment, so that a test can look at extents and damage them.
#ifndef HEADROOM_TESTS_COMMON_WORKER_HARNESS_H_
#define HEADROOM_TESTS_COMMON_WORKER_HARNESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/bounded_queue.h"
#include "common/device/cpu/cpu_device.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "services/kvstore/attend_pool.h"
#include "services/worker/device_budget.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"
#include "services/worker/step.h"
#include "services/worker/step_executor.h"
#include "tests/common/random_model.h"

namespace headroom {

// The tests' device (HEADROOM_TEST_DEVICE, else the CPU) is a GPU: fewer ways of computing a sequence give
// the same bits there, and products round to bfloat16.
bool OnGpu();

// A random model's folder, removed in the end.
class RandomModelFolder {
 public:
  static absl::StatusOr<std::unique_ptr<RandomModelFolder>> Create(const RandomModelSpec& spec);
  ~RandomModelFolder();
  const std::string& path() const { return path_; }

 private:
  explicit RandomModelFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

// 3 layers that are small in everything; sizes that are no multiples of vectors.
RandomModelSpec SmallModel(int64_t q_heads = 6, int64_t kv_heads = 3, int64_t head_dim = 64);

// ---- Plans.
using LaneOfHead = std::function<Lane(int32_t layer, int32_t kv_head)>;
Plan WholeHeadPlan(uint64_t version, const KvGeometry& geometry, const LaneOfHead& lane);
Plan ResidentPlan(uint64_t version, const KvGeometry& geometry);
Plan FetchedPlan(uint64_t version, const KvGeometry& geometry);
Plan InPlacePlan(uint64_t version, const KvGeometry& geometry);
// Heads below `kv_head` are resident, those above fetched; `kv_head` itself is `below` up to position
// `border` and `above` from there on.
Plan SplitHeadPlan(uint64_t version, const KvGeometry& geometry, int32_t kv_head, int64_t border,
                   Lane below, Lane above);

// How many keys the lanes get, and how many are left to the tail.
enum class SealedRule {
  kCoordinator,  // a block more in the tail than need be, and what no step has confirmed yet
  kAtOnce,       // every whole block
  kLeast,        // only what the tail cannot hold
};

struct WorkerHarnessOptions {
  int64_t budget_bytes = int64_t{96} << 20;
  int64_t ring_bytes = 0;  // 0: as DivideBudget() has it; else less, so that tiles wrap
  int64_t kv_pool_bytes = 0;  // likewise, so that what is freed is taken at once
  int64_t chunk_limit_tokens = 1024;
  int64_t max_context_tokens = 4096;
  int64_t segment_bytes = int64_t{8} << 20;
  int32_t max_sequences = 16;
  int compute_threads = 1;
  // Of a pool that attends to keys in place; 0: there is none.
  int attend_threads = 0;
  bool attend_as_for_gpu = false;  // in tiles, of the processor or portable ones, whatever the device is
  absl::Duration in_place_deadline = absl::Seconds(30);
  std::optional<uint64_t> delay_seed;
  // Puts a device of the test's in front of the real one. What it takes of the arena is not divided.
  std::function<std::unique_ptr<Device>(std::unique_ptr<Device>)> wrap_device;
};

struct TestRequest {
  std::vector<int32_t> prompt;
  int64_t chunk_tokens = int64_t{1} << 30;
  int num_draws = 0;
  bool score = true;  // the prompt's tokens
  float temperature = 0;
  uint64_t seed = 0;
  int32_t num_top_logprobs = 0;
  float repetition_penalty = 1;
  float frequency_penalty = 0;
  std::optional<DrawHistory> history;  // what the sequence is opened with
  int64_t max_run_tokens = int64_t{1} << 30;  // of one run, less than the geometry's if wished
  // Keys that an earlier sequence left: the prompt's first `sealed_tokens` are not computed again.
  std::vector<Run> runs;
  int64_t sealed_tokens = 0;
};

struct TestOutput {
  std::vector<kernels::SampleResult> scored;  // of the prompt's tokens after the first computed one
  std::vector<kernels::SampleResult> drawn;
  std::vector<Run> runs;
  int64_t sealed_tokens = 0;
};

struct RunOptions {
  uint64_t plan_version = 1;
  std::vector<uint64_t> plan_cycle;  // if not empty: each step takes the next of these
  SealedRule sealed = SealedRule::kCoordinator;
  // One chunk step takes a chunk of every sequence, instead of the first that has one.
  bool chunks_together = false;
  int depth = 2;  // steps of one kind in flight
  // Called with the number of steps that have ended, before the next ones are sent.
  std::function<void(int steps)> on_step;
  // Sequences after the first begin only when the first has drawn this many tokens.
  int first_draws_alone = 0;
};

// What a step of a run was and what it reported.
struct StepRecord {
  uint64_t plan_version = 0;
  std::vector<StepSequence> sequences;
  std::map<uint64_t, std::vector<Run>> runs;  // of its sequences, as of the step
  StepResult result;
};

class WorkerHarness {
 public:
  static absl::StatusOr<std::unique_ptr<WorkerHarness>> Create(const std::string& model_dir,
                                                               const WorkerHarnessOptions& options);
  ~WorkerHarness();

  // Runs all requests side by side to their end and closes their sequences.
  absl::StatusOr<std::vector<TestOutput>> Run(const std::vector<TestRequest>& requests,
                                              const RunOptions& options = {});
  absl::StatusOr<TestOutput> RunOne(const TestRequest& request, const RunOptions& options = {});
  // The steps of the latest Run().
  const std::vector<StepRecord>& steps() const { return records_; }

  // ---- For tests that make their steps themselves.
  // Gives a step its number and hands it over.
  absl::Status Submit(std::unique_ptr<Step> step);
  // The next step that ends; null after a minute.
  std::unique_ptr<Step> Await();
  // Both, one after the other.
  std::unique_ptr<Step> RunStep(std::unique_ptr<Step> step);
  // A run of extents in fresh memory of the segment.
  struct Run NewRun(int64_t first_pos, int64_t capacity_tokens);
  uint64_t NewSequenceId() { return next_sequence_id_++; }
  uint64_t NewStepNumber() { return next_step_number_++; }

  // K (part 0) or V (part 1) row of one head and position in a run's extent.
  uint8_t* ExtentRow(const struct Run& run, int32_t layer, int32_t kv_head, int64_t pos, int part);

  // A new mailbox on both sides, with a new pool: as after a store's death and return.
  absl::Status OpenInPlace(int attend_threads, bool as_for_gpu = false);
  // The pool ends, and answers nothing any more.
  void KillPool() { pool_.reset(); }
  kvstore::AttendPool* pool() { return pool_.get(); }
  Mailbox* mailbox() { return mailbox_.get(); }
  std::shared_ptr<Mailbox> shared_mailbox() { return mailbox_; }
  // Steps that were discarded and run again in the latest Run().
  int retries() const { return retries_; }

  StepExecutor& executor() { return *executor_; }
  Device& device() { return *device_; }
  const ModelConfig& config() const { return config_; }
  KvGeometry geometry() const { return config_.kv_geometry(); }
  const DeviceBudget& budget() const { return budget_; }
  std::vector<uint8_t>& segment() { return segment_; }
  // Memory of the segment in use; the rest is free for NewRun().
  int64_t segment_used() const { return segment_used_; }
  void set_segment_used(int64_t bytes) { segment_used_ = bytes; }

 private:
  struct Progress;

  WorkerHarness() = default;
  std::unique_ptr<Step> ComposeStep(bool chunk, std::vector<Progress>& all,
                                    const RunOptions& options);
  void AddPiece(Progress& progress, Step& step, const RunOptions& options);
  absl::Status Receive(std::unique_ptr<Step> step, std::vector<Progress>& all);

  ModelConfig config_;
  DeviceBudget budget_;
  std::unique_ptr<Device> device_;
  ModelWeights weights_;
  std::vector<uint8_t> segment_;
  int64_t segment_used_ = 0;
  uint64_t next_sequence_id_ = 1;
  uint64_t next_step_number_ = 1;
  size_t steps_composed_ = 0;  // in the latest Run()
  std::vector<StepRecord> records_;
  int retries_ = 0;
  std::string mailbox_dir_;
  uint64_t mailboxes_ = 0;
  std::shared_ptr<Mailbox> mailbox_;
  std::unique_ptr<kvstore::AttendPool> pool_;

  Mutex mutex_;
  CondVar ended_;
  BoundedQueue<std::unique_ptr<Step>, 64> done_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<StepExecutor> executor_;  // last: its threads use the above
};

// `count` ids below `vocab`, drawn from `seed`.
std::vector<int32_t> RandomTokens(uint64_t seed, int64_t count, int64_t vocab);

// "" if both hold the same tokens and log-probabilities to the bit; else the first difference.
std::string Difference(const std::vector<kernels::SampleResult>& a,
                       const std::vector<kernels::SampleResult>& b);
std::string Difference(const TestOutput& a, const TestOutput& b);

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_WORKER_HARNESS_H_
