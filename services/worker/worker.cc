#include "services/worker/worker.h"

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/device/device_factory.h"
#include "common/log.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr int64_t kMaxGpuMemoryBytes = int64_t{1} << 50;
constexpr int64_t kMiB = int64_t{1} << 20;
// What the CPU device gets beside the weights where nothing is said.
constexpr int64_t kDefaultCpuKvBytes = int64_t{2} << 30;

absl::Status CheckOptions(const WorkerOptions& options) {
  const auto range = [](absl::string_view flag, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", value, ", expected ", low, " to ", high));
  };
  if (options.model_dir.empty()) return absl::InvalidArgumentError("--model is not set");
  HEADROOM_RETURN_IF_ERROR(
      range("--gpu-memory", options.gpu_memory_bytes, 0, kMaxGpuMemoryBytes));
  HEADROOM_RETURN_IF_ERROR(range("--threads", options.compute_threads, 0, 1024));
  HEADROOM_RETURN_IF_ERROR(
      range("--max-chunk-tokens", options.max_chunk_tokens, kMinChunkTokens, kMaxChunkTokens));
  if (options.in_place_deadline < absl::Milliseconds(1) ||
      options.in_place_deadline > absl::Minutes(1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--in-place-deadline ", absl::FormatDuration(options.in_place_deadline),
                     ", expected 1ms to 1m"));
  }
  HEADROOM_RETURN_IF_ERROR(
      range("--max-context-tokens", options.max_context_tokens, 0, int64_t{1} << 32));
  return range("--max-sequences", options.max_sequences, 1, Decoder::kMaxSequences);
}

// Tables are laid out for so many tokens.
int64_t ContextTokens(const WorkerOptions& options, const ModelConfig& config) {
  return options.max_context_tokens != 0 ? options.max_context_tokens : config.max_position_tokens;
}

std::string Since(absl::Time begun) {
  return absl::FormatDuration(absl::Trunc(absl::Now() - begun, absl::Milliseconds(1)));
}

// One line for each tenth of the weights, if it takes long.
class LoadProgress {
 public:
  explicit LoadProgress(int64_t bytes) : bytes_(bytes), next_(absl::Now() + kInterval) {}
  void operator()(double share) {
    if (absl::Now() < next_) return;
    next_ = absl::Now() + kInterval;
    LogInfo(absl::StrFormat("loading weights: %.0f%% of %d MiB", 100 * share, bytes_ / kMiB));
  }

 private:
  static constexpr absl::Duration kInterval = absl::Seconds(2);
  const int64_t bytes_;
  absl::Time next_;
};

}  // namespace

absl::Status Worker::CheckFlags(const WorkerOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  HEADROOM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(options.model_dir));
  if (options.gpu_memory_bytes == 0) return absl::OkStatus();
  return DivideBudget(config, WeightBytes(config, kernels::PackedWeightBytes),
                      options.gpu_memory_bytes, options.max_chunk_tokens,
                      ContextTokens(options, config), ProductTypeOf(ChooseDevice(options.device)))
      .status();
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(const WorkerOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  std::unique_ptr<Worker> worker(new Worker());
  HEADROOM_RETURN_IF_ERROR(worker->Init(options));
  return worker;
}

absl::Status Worker::Init(const WorkerOptions& options) {
  const absl::Time begun = absl::Now();
  std::random_device random;
  incarnation_ = uint64_t{random()} << 32 | random();
  max_sequences_ = options.max_sequences;
  HEADROOM_ASSIGN_OR_RETURN(config_, ReadModelConfig(options.model_dir));
  DeviceOptions device;
  device.kind = options.device;
  device.compute_threads = options.compute_threads != 0
                               ? options.compute_threads
                               : static_cast<int>(std::thread::hardware_concurrency());
  device.delay_seed = options.delay_seed;
  device.fail_file = options.fail_file;
  on_device_lost_ = options.on_device_lost;
  device.memory_bytes = options.gpu_memory_bytes;
  if (device.memory_bytes == 0 && ChooseDevice(device.kind) == "cpu") {
    device.memory_bytes = WeightBytes(config_, kernels::PackedWeightBytes) + kDefaultCpuKvBytes;
  }
  HEADROOM_ASSIGN_OR_RETURN(device_, CreateDevice(device));
  // Too small a budget is said before anything is loaded.
  HEADROOM_ASSIGN_OR_RETURN(
      budget_, DivideBudget(config_, WeightBytes(config_, *device_),
                            device_->arena_use().free_bytes(), options.max_chunk_tokens,
                            ContextTokens(options, config_), device_->product_type()));
  // Weights come while the device plans its products and attention.
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<WeightLoading> loading,
                            WeightLoading::Begin(options.model_dir, config_, *device_));
  weights_ = loading->weights();
  absl::StatusOr<std::array<uint8_t, 16>> fingerprint;
  std::thread filling([&] {
    const absl::Time from = absl::Now();
    fingerprint = loading->Fill(LoadProgress(budget_.weights_bytes));
    if (!fingerprint.ok()) return;
    LogInfo(absl::StrFormat("loaded %d MiB of weights in %s", budget_.weights_bytes / kMiB, Since(from)));
  });
  const absl::Status prepared = PrepareSteps(options, *loading);
  filling.join();
  HEADROOM_RETURN_IF_ERROR(fingerprint.status());
  HEADROOM_RETURN_IF_ERROR(prepared);
  weights_.fingerprint = *fingerprint;
  plans_at_start_ = plans_built();
  LogInfo(absl::StrFormat(
      "%s on %s in %s: %d MiB of device memory (weights %d, ring %d, activations %d, KV %d), chunks "
      "of %d tokens, %d plans built",
      config_.architecture, std::string(device_->name()), Since(begun),
      budget_.budget_bytes / kMiB, budget_.weights_bytes / kMiB, budget_.ring_bytes / kMiB,
      budget_.activation_bytes / kMiB, budget_.kv_pool_bytes / kMiB, budget_.max_chunk_tokens,
      plans_at_start_));
  return absl::OkStatus();
}

absl::Status Worker::PrepareSteps(const WorkerOptions& options, WeightLoading& loading) {
  HEADROOM_RETURN_IF_ERROR(loading.PrepareProducts());
  StepExecutorOptions executor;
  executor.max_sequences = max_sequences_;
  executor.in_place_deadline = options.in_place_deadline;
  HEADROOM_ASSIGN_OR_RETURN(
      executor_, StepExecutor::Create(*device_, config_, weights_, budget_, executor,
                                      [this](std::unique_ptr<Step> step) {
                                        OnDone(std::move(step));
                                      }));
  return absl::OkStatus();
}

Worker::~Worker() {
  if (executor_ == nullptr) return;  // it never began
  executor_.reset();  // waits for what is in flight; then nothing names the segment
  LogInfo(absl::StrFormat("plans built: %d at start, %d since", plans_at_start_,
                          plans_built() - plans_at_start_));
}

int64_t Worker::registered_host_bytes() const {
  MutexLock lock(&mutex_);
  return segment_ == nullptr ? 0 : segment_->registered_bytes();
}

absl::StatusOr<int64_t> Worker::AttachStore(const std::string& segment_dir, uint64_t generation) {
  {
    MutexLock lock(&mutex_);
    if (segment_ != nullptr && segment_->segment().generation() == generation) {
      return segment_->registered_bytes();
    }
  }
  SegmentBinding expected;
  expected.geometry = config_.kv_geometry();
  expected.fingerprint = weights_.fingerprint;
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<MappedSegment> mapped,
                            MappedSegment::Open(segment_dir, expected, generation));
  HEADROOM_ASSIGN_OR_RETURN(std::shared_ptr<RegisteredSegment> segment,
                            RegisteredSegment::Create(*device_, std::move(mapped)));
  HEADROOM_RETURN_IF_ERROR(executor_->AttachSegment(
      {segment->segment().data(), segment->segment().data_bytes()}));
  LogInfo(absl::StrFormat("attached to generation %016x of the store: %d MiB", generation,
                          segment->segment().data_bytes() / kMiB));
  const int64_t registered = segment->registered_bytes();
  // The old one is let go of outside the lock: nothing in flight names it any more.
  std::shared_ptr<RegisteredSegment> old;
  MutexLock lock(&mutex_);
  old = std::exchange(segment_, std::move(segment));
  segment_dir_ = segment_dir;
  return registered;
}

absl::StatusOr<std::string> Worker::OpenMailbox(uint64_t generation) {
  MailboxShape shape =
      MailboxShapeOf(config_, budget_, /*poster_wakes=*/device_->name() == "cpu");
  shape.generation = generation;
  shape.incarnation = incarnation_;
  std::string dir, name;
  {
    MutexLock lock(&mutex_);
    if (segment_ == nullptr || segment_->segment().generation() != generation) {
      return absl::FailedPreconditionError(
          absl::StrCat("generation ", generation, " of the store is not attached"));
    }
    if (mailbox_ != nullptr && mailbox_->shape().generation == generation &&
        mailbox_->header().retired.load() == 0) {
      return mailbox_file_;
    }
    dir = segment_dir_;
    name = MailboxFile(generation, ++mailboxes_);
  }
  HEADROOM_ASSIGN_OR_RETURN(std::shared_ptr<Mailbox> mailbox, Mailbox::Create(dir, name, shape));
  HEADROOM_RETURN_IF_ERROR(executor_->SetMailbox(mailbox));
  LogInfo(absl::StrCat("mailbox ", name, ": ", mailbox->bytes() / 1024, " KiB"));
  MutexLock lock(&mutex_);
  mailbox_ = std::move(mailbox);
  mailbox_file_ = name;
  return name;
}

absl::StatusOr<LaneCosts> Worker::MeasureLanes() {
  CalibrationOptions options;
  options.budget = budget_;
  std::string with;
  std::shared_ptr<RegisteredSegment> segment;
  {
    MutexLock lock(&mutex_);
    if (segment_ == nullptr) return absl::FailedPreconditionError("no store is attached");
    const bool in_place = mailbox_ != nullptr && mailbox_->header().retired.load() == 0 &&
                          mailbox_->header().attached.load() == mailbox_->shape().generation;
    with = in_place ? mailbox_file_ : absl::StrCat("none ", segment_->segment().generation());
    if (lane_costs_.known() && measured_for_ == with) return lane_costs_;
    if (sink_ != nullptr) return absl::FailedPreconditionError("a step stream is open");
    segment = segment_;
    measuring_ = true;
  }
  options.segment_bytes = segment->registered_bytes();
  uint64_t number = 0;
  StepPort port;
  port.submit = [this](std::unique_ptr<Step> step) { return executor_->Submit(std::move(step)); };
  port.take = [this] { return TakeMeasured(); };
  port.next_number = [&number] { return ++number; };
  const absl::Time begun = absl::Now();
  const absl::StatusOr<LaneCosts> costs = CalibrateLanes(*executor_, config_, options, port);
  MutexLock lock(&mutex_);
  measuring_ = false;
  measured_.clear();
  HEADROOM_RETURN_IF_ERROR(costs.status());
  lane_costs_ = *costs;
  measured_for_ = with;
  const auto rate = [&](Lane lane) {
    const double seconds = costs->seconds_per_byte[static_cast<int>(lane)];
    return seconds > 0 ? 1e-9 / seconds : 0.0;
  };
  LogInfo(absl::StrFormat(
      "a decode step takes %.2f ms, %.2f with all keys resident, and keys: resident %.1f, fetched %.1f, "
      "in place %.1f GB/s and %.2f ms; "
      "copies hide under %.0f%% of it; beside each other fetched and in place take %.2f and %.2f times as "
      "long (measured in %s)",
      1e3 * costs->base_seconds, 1e3 * costs->resident_base_seconds, rate(Lane::kResident),
      rate(Lane::kFetched), rate(Lane::kInPlace), 1e3 * costs->in_place_seconds, 100 * costs->hidden_base,
      costs->fetched_slowdown, costs->in_place_slowdown, Since(begun)));
  return *costs;
}

absl::StatusOr<std::unique_ptr<Step>> Worker::TakeMeasured() {
  MutexLock lock(&mutex_);
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (measured_.empty()) {
    if (absl::Now() > deadline) return absl::DeadlineExceededError("a step has not ended in time");
    measured_one_.WaitFor(&mutex_, absl::Seconds(1));
  }
  std::unique_ptr<Step> step = std::move(measured_.front());
  measured_.pop_front();
  return step;
}

absl::Status Worker::BeginStream(StepSink sink) {
  {
    MutexLock lock(&mutex_);
    ++stream_;
    sink_ = nullptr;
  }
  HEADROOM_RETURN_IF_ERROR(executor_->CloseAll());
  if (sink == nullptr) return absl::OkStatus();
  MutexLock lock(&mutex_);
  sink_ = std::make_shared<const StepSink>(std::move(sink));
  return absl::OkStatus();
}

absl::Status Worker::Submit(std::unique_ptr<Step> step) {
  std::shared_ptr<RegisteredSegment> segment;
  {
    MutexLock lock(&mutex_);
    step->stream = stream_;
    segment = segment_;
  }
  if (segment == nullptr) {
    return absl::FailedPreconditionError("no store is attached: AttachStore comes first");
  }
  int64_t end = 0;
  const int64_t token_bytes = config_.kv_geometry().BytesPerTokenPerLayer();
  const auto require = [&](const Run& run) {
    const int64_t bytes =
        std::clamp<int64_t>(run.capacity_tokens, 0, config_.kv_geometry().MaxExtentTokens()) *
        token_bytes;
    for (const int64_t offset : run.data_offsets) {
      // What leaves the segment is refused by name when the step begins.
      if (offset >= 0 && offset <= segment->segment().data_bytes() - bytes) {
        end = std::max(end, offset + bytes);
      }
    }
  };
  for (const OpenSequence& open : step->open) {
    for (const Run& run : open.runs) require(run);
  }
  for (const RunGrant& grant : step->grants) require(grant.run);
  HEADROOM_RETURN_IF_ERROR(segment->Require(end));
  return executor_->Submit(std::move(step));
}

void Worker::OnDone(std::unique_ptr<Step> step) {
  if (on_device_lost_ != nullptr) {
    if (const absl::Status lost = device_->status(); !lost.ok()) on_device_lost_(lost);
  }
  std::shared_ptr<const StepSink> sink;
  {
    MutexLock lock(&mutex_);
    if (measuring_) {
      measured_.push_back(std::move(step));
      measured_one_.SignalAll();
      return;
    }
    if (step->stream != stream_) return;  // its stream has ended
    sink = sink_;
  }
  if (sink != nullptr) (*sink)(std::move(step));
}

}  // namespace headroom
