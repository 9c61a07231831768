#include "services/headroom/bench/engine.h"

#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/device_factory.h"
#include "common/kv_layout.h"
#include "common/segment_format.h"
#include "common/status.h"
#include "common/steady_time.h"
#include "services/coordinator/placement/step_model.h"
#include "services/headroom/bench/costs.h"
#include "services/headroom/bench/geometries.h"
#include "services/worker/model/random_weights.h"

namespace headroom {
namespace {

constexpr int64_t kDefaultKvBytes = int64_t{2} << 30;
constexpr absl::Duration kStepTimeout = absl::Minutes(10);
// Of a decode beside a prefill: at 20 ms each those of 80 s.
constexpr int64_t kMostStepsBeside = 4096;
// Any plan that sends every head to one lane has the lane's number, from 1 on.
uint64_t PlanVersionOf(Lane lane) { return 1 + static_cast<uint64_t>(lane); }

// Of all threads of this process, user and system.
double CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// What the weights take in the form of the CPU kernels.
int64_t WeightsBytes(const ModelConfig& config) {
  const double read = DecodeCosts(config, /*context_tokens=*/0, /*batch=*/1).weight_bytes;
  const int64_t embedding =
      config.tied_embeddings ? 0 : kernels::PackedWeightBytes(config.vocab, config.hidden);
  return static_cast<int64_t>(read) + embedding;
}

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const EngineOptions& options,
                                                   const ModelConfig& config) {
  DeviceOptions device;
  device.kind = options.device;
  device.compute_threads = options.threads;
  device.memory_bytes = options.gpu_memory_bytes;
  if (device.memory_bytes == 0 && ChooseDevice(options.device) == "cpu") {
    device.memory_bytes = WeightsBytes(config) + kDefaultKvBytes;
  }
  if (device.memory_bytes != 0) device.memory_bytes += options.beside_bytes;
  return CreateDevice(device);
}

int64_t PositionsOf(const WorkItem& item) {
  const int64_t question = item.kind == WorkItem::Kind::kQuestion ? kQuestionTokens : 0;
  return item.context_tokens + BenchEngine::WarmSteps(item) + BenchEngine::MeasuredSteps(item) +
         question + 1;
}

constexpr int64_t kPositionsBeside = kBesideContextTokens + kMostStepsBeside + 1;

int32_t SequencesOf(const WorkItem& item) {
  return item.kind == WorkItem::Kind::kBeside ? 2 : item.batch;
}

}  // namespace

// ---------------------------------------------------------------- construction

void BenchEngine::DoneQueue::Put(std::unique_ptr<Step> step) {
  MutexLock lock(&mutex_);
  steps_.push_back(std::move(step));
  put_.Signal();
}

absl::StatusOr<std::unique_ptr<Step>> BenchEngine::DoneQueue::Take() {
  MutexLock lock(&mutex_);
  const double deadline = SteadySeconds() + absl::ToDoubleSeconds(kStepTimeout);
  while (steps_.empty()) {
    put_.WaitFor(&mutex_, absl::Seconds(1));
    if (steps_.empty() && SteadySeconds() > deadline) {
      return absl::DeadlineExceededError("a step has not ended in time");
    }
  }
  std::unique_ptr<Step> step = std::move(steps_.front());
  steps_.pop_front();
  return step;
}

absl::StatusOr<ModelConfig> ConfigOf(const EngineOptions& options) {
  if (!options.model_dir.empty()) return ReadModelConfig(options.model_dir);
  return options.geometry.empty() ? ReadModelConfigFile(options.random_weights)
                                  : GeometryOf(options.geometry);
}

absl::StatusOr<std::unique_ptr<BenchEngine>> BenchEngine::Create(
    const EngineOptions& options, ModelConfig config, const std::vector<WorkItem>& items) {
  std::unique_ptr<BenchEngine> engine(new BenchEngine(std::move(config)));
  HEADROOM_RETURN_IF_ERROR(engine->Init(options, items));
  return engine;
}

BenchEngine::~BenchEngine() {
  executor_.reset();  // waits for what is in flight; then nothing names the segment
  pool_.reset();
  segment_.reset();  // the device outlives it
}

absl::Status BenchEngine::Init(const EngineOptions& options, const std::vector<WorkItem>& items) {
  chunk_tokens_ = options.chunk_tokens;
  const bool random = options.model_dir.empty();
  HEADROOM_ASSIGN_OR_RETURN(device_, MakeDevice(options, config_));
  // A batch's tables name the keys of all its sequences.
  int64_t positions = 1;
  int32_t batch = 1;
  for (const WorkItem& item : items) {
    positions = std::max(positions, PositionsOf(item) * item.batch);
    if (item.kind == WorkItem::Kind::kBeside) positions = std::max(positions, kPositionsBeside);
    batch = std::max(batch, SequencesOf(item));
  }
  HEADROOM_ASSIGN_OR_RETURN(
      budget_, DivideBudget(config_, WeightBytes(config_, *device_),
                            device_->arena_use().free_bytes() - options.beside_bytes, chunk_tokens_,
                            positions, device_->product_type()));
  HEADROOM_ASSIGN_OR_RETURN(
      weights_, random ? DrawWeights(config_, options.seed, *device_)
                       : LoadWeights(options.model_dir, config_, *device_, nullptr));
  StepExecutorOptions executor;
  executor.max_sequences = batch;
  executor.step_timeout = kStepTimeout;
  HEADROOM_ASSIGN_OR_RETURN(
      executor_, StepExecutor::Create(*device_, config_, weights_, budget_, executor,
                                      [this](std::unique_ptr<Step> step) {
                                        done_.Put(std::move(step));
                                      }));
  for (const Lane lane : {Lane::kResident, Lane::kFetched, Lane::kInPlace}) {
    LaneRange all;
    all.lane = lane;
    all.kv_head_end = config_.num_kv_heads;
    Plan plan;
    plan.version = PlanVersionOf(lane);
    plan.layers.assign(config_.num_layers, {all});
    HEADROOM_RETURN_IF_ERROR(executor_->PreparePlan(std::move(plan)));
  }
  HEADROOM_RETURN_IF_ERROR(MapSegment(items, options));
  return OpenInPlace(options.threads);
}

// A store's pool in this process, with as many threads as the device has.
absl::Status BenchEngine::OpenInPlace(int32_t threads) {
  MailboxShape shape = MailboxShapeOf(config_, budget_, device_->name() == "cpu");
  shape.generation = 1;
  HEADROOM_ASSIGN_OR_RETURN(const std::shared_ptr<Mailbox> mailbox, Mailbox::CreateUnnamed(shape));
  pool_ = std::make_unique<kvstore::AttendPool>(
      segment_->data(), [this] { return segment_->bytes(); }, threads);
  pool_->Attach(mailbox);
  return executor_->SetMailbox(mailbox);
}

absl::StatusOr<uint8_t*> BenchEngine::AwaitSegment(int64_t bytes) {
  HEADROOM_RETURN_IF_ERROR(segment_->Await(bytes));
  return segment_->data();
}

absl::Status BenchEngine::MapSegment(const std::vector<WorkItem>& items, const EngineOptions& options) {
  int64_t bytes = options.least_segment_bytes;
  for (const WorkItem& item : items) {
    int64_t used = 0;
    for (int32_t i = 0; i < item.batch; ++i) Layout(0, PositionsOf(item), used);
    if (item.kind == WorkItem::Kind::kBeside) Layout(0, kPositionsBeside, used);
    bytes = std::max(bytes, used);
  }
  HEADROOM_ASSIGN_OR_RETURN(segment_, BenchSegment::Create(*device_, bytes, options.threads));
  // What is measured more than once is not to meet the preparations the first time.
  if (std::none_of(items.begin(), items.end(), [](const WorkItem& item) { return item.once; })) {
    HEADROOM_RETURN_IF_ERROR(segment_->Await(bytes));
  }
  return executor_->AttachSegment({segment_->data(), segment_->bytes()});
}

OpenSequence BenchEngine::Layout(uint64_t id, int64_t tokens, int64_t& used_bytes) const {
  const KvGeometry geometry = config_.kv_geometry();
  OpenSequence open;
  open.sequence_id = id;
  for (int64_t have = 0; have < tokens;) {
    Run run;
    run.first_pos = have;
    // Nothing will follow: of a million tokens 0.4 GB are saved, without which they would not fit 128 GiB.
    const auto blocks = static_cast<uint64_t>(CeilToBlock(tokens - have) / kBlockTokens);
    run.capacity_tokens = std::min(NextExtentTokens(geometry, have, tokens - have),
                                   kBlockTokens * static_cast<int64_t>(std::bit_floor(blocks)));
    const int64_t bytes = run.capacity_tokens * geometry.BytesPerTokenPerLayer();
    for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
      // No extent crosses a registration.
      if (used_bytes / kRegistrationBytes != (used_bytes + bytes - 1) / kRegistrationBytes) {
        used_bytes = (used_bytes / kRegistrationBytes + 1) * kRegistrationBytes;
      }
      run.data_offsets.push_back(used_bytes);
      used_bytes += bytes;
    }
    have += run.capacity_tokens;
    open.runs.push_back(std::move(run));
  }
  return open;
}

int64_t BenchEngine::EndOfRuns(const std::vector<Run>& runs, int64_t tokens) const {
  int64_t end = 0;
  for (const Run& run : runs) {
    if (run.first_pos >= tokens) break;
    const int64_t bytes = run.capacity_tokens * config_.kv_geometry().BytesPerTokenPerLayer();
    for (const int64_t offset : run.data_offsets) end = std::max(end, offset + bytes);
  }
  return end;
}

int64_t BenchEngine::PrefillChunkTokens() const {
  return FloorToBlock(std::max(kBlockTokens, std::min(chunk_tokens_, budget_.max_chunk_tokens)));
}

// ---------------------------------------------------------------- measurements

absl::StatusOr<Measurement> BenchEngine::Measure(const WorkItem& item, absl::Time deadline,
                                                 const OnChunk& on_chunk) {
  absl::StatusOr<Measurement> measured =
      item.prefills() ? MeasurePrefill(item, deadline, on_chunk) : MeasureDecode(item);
  if (measured.ok() && item.kind == WorkItem::Kind::kQuestion) measured = MeasureQuestion(item);
  if (measured.ok()) measured->kv_pool_used_bytes = executor_->memory().kv_pool_used_bytes;
  HEADROOM_RETURN_IF_ERROR(executor_->CloseAll());
  HEADROOM_RETURN_IF_ERROR(measured.status());
  HEADROOM_RETURN_IF_ERROR(CheckResident(item, *measured));
  return measured;
}

absl::Status BenchEngine::CheckResident(const WorkItem& item,
                                        const Measurement& measurement) const {
  const double fetched = measurement.lane_bytes[static_cast<int>(Lane::kFetched)];
  double resident = item.lane == Lane::kResident ? 1 : 0;
  if (item.planned) {
    resident = item.placement.automatic ? 0 : item.placement.share(coordinator::Lane::kResident);
  }
  if (resident == 0) return absl::OkStatus();
  // A share is met to within an extent of one head a layer.
  const double kv = DecodeCosts(config_, MeanDecodeContext(item), item.batch).kv_bytes;
  const double at_most = resident == 1 ? 0 : (1 - resident) * kv + kv / config_.num_kv_heads;
  if (fetched <= at_most) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(item.ToString(), ": ", budget_.kv_pool_bytes,
                   " bytes of device memory for keys and values do not hold them: raise "
                   "--gpu-memory"));
}

uint64_t BenchEngine::PlanVersion(const WorkItem& item) const {
  return item.planned ? planned_version_ : PlanVersionOf(item.lane);
}

absl::StatusOr<Measurement> BenchEngine::MeasurePrefill(const WorkItem& item, absl::Time deadline,
                                                        const OnChunk& on_chunk) {
  const StepPort port = Port();
  int64_t used = 0;
  PrefillWork work;
  work.plan_version = PlanVersion(item);
  work.sequence = Layout(next_sequence_++, PositionsOf(item), used);
  work.context_tokens = item.context_tokens;
  work.chunk_tokens = PrefillChunkTokens();
  work.vocab = config_.vocab;
  work.deadline = deadline;
  work.await = [&](int64_t tokens) { return segment_->Await(EndOfRuns(work.sequence.runs, tokens)); };
  work.on_chunk = on_chunk;
  DecodeWork beside_work;
  DecodeSteps beside(beside_work, port);
  if (item.kind == WorkItem::Kind::kBeside) {
    beside_work.plan_version = work.plan_version;
    beside_work.context_tokens = kBesideContextTokens;
    beside_work.sequences.push_back(Layout(next_sequence_++, kPositionsBeside, used));
    HEADROOM_RETURN_IF_ERROR(segment_->Await(used));
    HEADROOM_RETURN_IF_ERROR(beside.Open());
    work.beside = &beside;
    work.most_beside = kMostStepsBeside;
  }
  const double cpu_begin = CpuSeconds();
  HEADROOM_ASSIGN_OR_RETURN(PrefillTimes times, headroom::MeasurePrefill(work, port));
  Measurement measured;
  measured.cpu_seconds = CpuSeconds() - cpu_begin;
  measured.seconds = measured.prefill_seconds = times.seconds;
  measured.prefilled_tokens = times.prefilled_tokens;
  if (work.beside != nullptr) {
    if (times.token_seconds.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat(item.ToString(), ": the prefill was over before a token beside it"));
    }
    times.Scale(1.0 / static_cast<double>(times.token_seconds.size()));
    std::sort(times.token_seconds.begin(), times.token_seconds.end());
    measured.token_seconds = std::move(times.token_seconds);
    measured.seconds = Percentile(measured.token_seconds, 99);
  }
  static_cast<StepTimes&>(measured) = times;
  return measured;
}

StepPort BenchEngine::Port() {
  StepPort port;
  port.submit = [this](std::unique_ptr<Step> step) { return executor_->Submit(std::move(step)); };
  port.take = [this] { return done_.Take(); };
  port.next_number = [this] { return next_step_++; };
  return port;
}

absl::StatusOr<Measurement> BenchEngine::MeasureDecode(const WorkItem& item) {
  DecodeWork work;
  work.plan_version = PlanVersion(item);
  work.context_tokens = item.context_tokens;
  work.warm_steps = WarmSteps(item);
  work.measured_steps = MeasuredSteps(item);
  int64_t used = 0;
  for (int32_t i = 0; i < item.batch; ++i) {
    work.sequences.push_back(Layout(next_sequence_++, PositionsOf(item), used));
  }
  HEADROOM_RETURN_IF_ERROR(segment_->Await(used));
  double cpu_begin = 0;
  work.on_measured_begin = [&cpu_begin] { cpu_begin = CpuSeconds(); };
  HEADROOM_ASSIGN_OR_RETURN(const DecodeTimes times, headroom::MeasureDecode(work, Port()));
  Measurement measured;
  static_cast<StepTimes&>(measured) = times;
  measured.seconds = times.step_seconds;
  measured.cpu_seconds = (CpuSeconds() - cpu_begin) / work.measured_steps;
  return measured;
}

absl::StatusOr<Measurement> BenchEngine::MeasureQuestion(const WorkItem& item) {
  StepSequence sequence;
  sequence.sequence_id = next_sequence_ - 1;
  sequence.first_pos = item.context_tokens + WarmSteps(item) + MeasuredSteps(item);
  sequence.sealed_tokens = FloorToBlock(item.context_tokens);
  sequence.token_ids.assign(kQuestionTokens, 1);
  sequence.draw = true;
  const StepPort port = Port();
  auto step = std::make_unique<Step>();
  step->number = port.next_number();
  step->plan_version = PlanVersion(item);
  step->sequences.push_back(std::move(sequence));
  Measurement measured;
  const double begin = SteadySeconds();
  const double cpu_begin = CpuSeconds();
  HEADROOM_RETURN_IF_ERROR(port.submit(std::move(step)));
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<Step> done, TakeStep(port));
  measured.seconds = SteadySeconds() - begin;
  measured.cpu_seconds = CpuSeconds() - cpu_begin;
  measured.Add(done->result, 1);
  return measured;
}

absl::StatusOr<BenchEngine::Planned> BenchEngine::PlanFor(const WorkItem& item) {
  HEADROOM_ASSIGN_OR_RETURN(const LaneCosts costs, Calibrate());
  const KvGeometry geometry = config_.kv_geometry();
  std::vector<coordinator::SequenceShape> shapes;
  int64_t used = 0;
  for (int32_t i = 0; i < item.batch; ++i) {
    coordinator::SequenceShape shape;
    shape.tokens = FloorToBlock(item.context_tokens);
    for (const Run& run : Layout(1, PositionsOf(item), used).runs) {
      shape.runs.push_back({run.first_pos, run.capacity_tokens});
    }
    shapes.push_back(std::move(shape));
  }
  const int64_t pool_bytes =
      budget_.kv_pool_bytes - item.batch * budget_.tail_bytes_per_sequence;
  const coordinator::Placement placement =
      item.placement.automatic
          ? coordinator::PlaceByBudget(geometry, pool_bytes, costs, shapes, config_.windows)
          : coordinator::PlaceByShares(geometry, item.placement, shapes);
  Plan plan;
  plan.version = ++planned_version_;
  for (const std::vector<coordinator::LaneRange>& ranges : placement.layers) {
    plan.layers.emplace_back();
    for (const coordinator::LaneRange& range : ranges) {
      plan.layers.back().push_back({static_cast<Lane>(range.lane), range.kv_head_begin,
                                    range.kv_head_end, range.first_pos, range.end_pos});
    }
  }
  HEADROOM_RETURN_IF_ERROR(executor_->PreparePlan(std::move(plan)));
  const coordinator::LaneBytes bytes = coordinator::BytesOfStep(geometry, placement, shapes, config_.windows);
  Planned planned;
  planned.step_seconds = StepSeconds(costs, bytes);
  std::copy(bytes.begin(), bytes.end(), planned.lane_bytes);
  return planned;
}

absl::StatusOr<LaneCosts> BenchEngine::Calibrate() {
  HEADROOM_RETURN_IF_ERROR(segment_->Await(segment_->bytes()));
  CalibrationOptions options;
  options.segment_bytes = segment_->bytes();
  options.budget = budget_;
  return CalibrateLanes(*executor_, config_, options, Port());
}

}  // namespace headroom
