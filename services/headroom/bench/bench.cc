#include "services/headroom/bench/bench.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/device/card_probe.h"
#include "common/device/device_factory.h"
#include "common/status.h"
#include "common/trace.h"
#include "kernels/cpu/team.h"
#include "services/headroom/bench/ceilings.h"
#include "services/headroom/bench/costs.h"
#include "services/headroom/bench/engine.h"
#include "services/headroom/bench/gpu_ceilings.h"
#include "services/headroom/bench/known_ceilings.h"
#include "services/headroom/bench/report.h"
#include "services/headroom/bench/work_item.h"
#include "services/headroom/exit_code.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

constexpr int32_t kMaxThreads = 1024;
constexpr int64_t kCpuChunkTokens = 1024;
constexpr int64_t kMaxGpuMemoryBytes = int64_t{1} << 50;

absl::Status CheckOptions(const BenchOptions& options) {
  const auto range = [](absl::string_view flag, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", value, ", expected ", low, " to ", high));
  };
  const int models = static_cast<int>(!options.model_dir.empty()) +
                     static_cast<int>(!options.random_weights.empty()) +
                     static_cast<int>(!options.geometry.empty());
  if (models != 1) {
    return absl::InvalidArgumentError(
        models == 0 ? "--model, --random-weights or --geometry must be set"
                    : "--model, --random-weights and --geometry exclude each other");
  }
  HEADROOM_RETURN_IF_ERROR(range("--threads", options.threads, 0, kMaxThreads));
  HEADROOM_RETURN_IF_ERROR(
      range("--gpu-memory", options.gpu_memory_bytes, 0, kMaxGpuMemoryBytes));
  if (options.chunk_tokens != 0) {
    HEADROOM_RETURN_IF_ERROR(
        range("--chunk-tokens", options.chunk_tokens, kMinChunkTokens, kMaxChunkTokens));
  }
  HEADROOM_RETURN_IF_ERROR(
      range("--stop-after", options.stop_after_seconds, 0, kMaxBenchStopAfterSeconds));
  return range("--repeat", options.repeat, kMinBenchRepeats, kMaxBenchRepeats);
}

absl::StatusOr<std::vector<WorkItem>> ItemsOf(const BenchOptions& options) {
  if (options.work.empty()) return WorkItemsOf(options.set, options.seed);
  std::vector<WorkItem> items;
  for (const std::string& text : options.work) {
    HEADROOM_ASSIGN_OR_RETURN(const WorkItem item, ParseWorkItem(text));
    items.push_back(item);
  }
  return items;
}

EngineOptions EngineOptionsOf(const BenchOptions& options) {
  EngineOptions engine;
  engine.model_dir = options.model_dir;
  engine.random_weights = options.random_weights;
  engine.geometry = options.geometry;
  engine.seed = options.seed;
  engine.device = ChooseDevice(options.device);
  engine.threads = options.threads != 0
                       ? options.threads
                       : std::min(kernels::CpuTeam::NumProcessors(), int{kMaxThreads});
  engine.gpu_memory_bytes = options.gpu_memory_bytes;
  engine.chunk_tokens = options.chunk_tokens;
  if (engine.chunk_tokens == 0) {
    engine.chunk_tokens = engine.device == "cuda" ? kMaxChunkTokens : kCpuChunkTokens;
  }
  return engine;
}

// One run of the bench: an engine, what the machine can do, and where the figures go.
class BenchRun {
 public:
  static absl::StatusOr<std::unique_ptr<BenchRun>> Create(const BenchOptions& options,
                                                          const std::vector<WorkItem>& items);
  absl::Status Measure(const WorkItem& item);

 private:
  BenchRun(const BenchOptions& options, BenchReport report)
      : repeat_(options.repeat),
        deadline_(options.stop_after_seconds == 0
                      ? absl::InfiniteFuture()
                      : absl::Now() + absl::Seconds(options.stop_after_seconds)),
        report_(std::move(report)) {}
  absl::Status Init(const BenchOptions& options, const std::vector<WorkItem>& items);
  absl::Status LookAtMemory(BenchResult& result);

  const int32_t repeat_;
  const absl::Time deadline_;  // of the prefills
  BenchReport report_;
  bool gpu_ = false;
  Ceilings known_;
  std::unique_ptr<BenchEngine> engine_;
  int64_t probe_bytes_ = 0;  // in the engine's arena
  std::unique_ptr<CeilingProbe> probe_;  // works on the engine's device
};

absl::StatusOr<std::unique_ptr<BenchRun>> BenchRun::Create(const BenchOptions& options,
                                                           const std::vector<WorkItem>& items) {
  HEADROOM_ASSIGN_OR_RETURN(BenchReport report, BenchReport::Open(options.json_path));
  std::unique_ptr<BenchRun> run(new BenchRun(options, std::move(report)));
  HEADROOM_RETURN_IF_ERROR(run->Init(options, items));
  return run;
}

absl::Status BenchRun::Init(const BenchOptions& options, const std::vector<WorkItem>& items) {
  const absl::Time begin = absl::Now();
  EngineOptions engine = EngineOptionsOf(options);
  HEADROOM_ASSIGN_OR_RETURN(ModelConfig config, ConfigOf(engine));
  GpuProbeShape shape;
  shape.attend = WideShapeOf(config, shape.attend.max_rows);
  gpu_ = engine.device == "cuda";
  if (gpu_) {
    engine.beside_bytes = probe_bytes_ = GpuCeilingProbe::ArenaBytes(shape);
    engine.least_segment_bytes = GpuCeilingProbe::HostBytes(shape);
  }
  HEADROOM_ASSIGN_OR_RETURN(engine_, BenchEngine::Create(engine, std::move(config), items));
  Device& device = engine_->device();
  known_ = KnownCeilings(device.name());
  if (gpu_) {
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const host, engine_->AwaitSegment(engine.least_segment_bytes));
    HEADROOM_ASSIGN_OR_RETURN(
        probe_, GpuCeilingProbe::Create(device, shape, host, engine.threads, &CardReadRate));
  } else {
    HEADROOM_ASSIGN_OR_RETURN(probe_, CpuCeilingProbe::Create(engine.threads));
  }
  BenchSetup setup;
  setup.model = !options.model_dir.empty()
                    ? options.model_dir
                    : absl::StrCat("random weights of ", options.random_weights, options.geometry);
  setup.device = std::string(device.name());
  setup.gpu = gpu_;
  setup.threads = engine.threads;
  setup.chunk_tokens = engine_->PrefillChunkTokens();
  setup.budget = engine_->budget();
  setup.known = known_;
  setup.prepare_seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  return report_.Begin(setup);
}

absl::Status BenchRun::Measure(const WorkItem& item) {
  BenchResult result;
  result.item = item;
  HEADROOM_ASSIGN_OR_RETURN(const Ceilings before, probe_->Measure());
  const auto on_chunk = [&](int64_t tokens, double seconds) {
    return report_.AddChunk(item, tokens, seconds);
  };
  for (int32_t i = 0; i < (item.once ? 1 : repeat_); ++i) {
    // Said before it runs, of lanes that were measured just now: a shared machine's memory is half as fast again from
    // one moment to the next.
    double predicted_seconds = 0;
    if (item.planned) {
      HEADROOM_ASSIGN_OR_RETURN(const BenchEngine::Planned planned, engine_->PlanFor(item));
      // What is planned, and predicted, is a decode step; a question has a plan's lanes, and more to do.
      if (item.kind == WorkItem::Kind::kDecode) predicted_seconds = planned.step_seconds;
      BenchReport::PrintPlan(item, planned.step_seconds, planned.lane_bytes);
    }
    HEADROOM_ASSIGN_OR_RETURN(Measurement measurement, engine_->Measure(item, deadline_, on_chunk));
    measurement.predicted_seconds = predicted_seconds;
    // Of prefills that are whole and one that is cut off there is no median: either those or this one.
    const bool cut_off =
        item.prefills() && measurement.prefilled_tokens < item.context_tokens;
    if (cut_off && !result.measurements.empty()) break;
    result.measurements.push_back(measurement);
    HEADROOM_RETURN_IF_ERROR(LookAtMemory(result));
    if (cut_off) break;
  }
  HEADROOM_ASSIGN_OR_RETURN(const Ceilings after, probe_->Measure());
  result.ceilings = Larger(before, after);
  result.floor_ceilings = FloorCeilings(result.ceilings, known_);
  const bool prefill = item.kind == WorkItem::Kind::kPrefill;
  result.costs = prefill ? PrefillCosts(engine_->config(), result.median().prefilled_tokens)
                         : DecodeCosts(engine_->config(), BenchEngine::MeanDecodeContext(item),
                                       item.batch);
  const Measurement& median = result.median();
  result.costs.copied_bytes = median.lane_bytes[static_cast<int>(Lane::kFetched)];
  result.costs.in_place_bytes = median.lane_bytes[static_cast<int>(Lane::kInPlace)];
  const auto decode_floor = gpu_ ? &GpuDecodeFloorSeconds : &DecodeFloorSeconds;
  result.floor_seconds =
      (prefill ? &PrefillFloorSeconds : decode_floor)(result.costs, result.floor_ceilings);
  return report_.Add(result);
}

// The most so far. The arena is carved at start; what of its KV pool the item left free is no need,
// nor is the probe's part.
absl::Status BenchRun::LookAtMemory(BenchResult& result) {
  const StepExecutor::Memory memory = engine_->memory();
  if (gpu_) {
    HEADROOM_ASSIGN_OR_RETURN(const int64_t in_use, CardMemoryInUse());
    result.beside_arena_bytes =
        std::max(result.beside_arena_bytes, in_use - memory.arena.capacity_bytes);
  }
  const int64_t arena_bytes = memory.arena.used_bytes - probe_bytes_ - memory.kv_pool_bytes +
                              result.measurements.back().kv_pool_used_bytes;
  result.peak_bytes = std::max(result.peak_bytes, arena_bytes + result.beside_arena_bytes);
  return absl::OkStatus();
}

absl::Status MeasureAll(const BenchOptions& options, const std::vector<WorkItem>& items) {
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<BenchRun> run,
                            BenchRun::Create(options, items));
  for (const WorkItem& item : items) HEADROOM_RETURN_IF_ERROR(run->Measure(item));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LaneCosts> MeasureLaneCosts(const BenchOptions& options) {
  // Lays out a segment that is larger than the caches.
  const WorkItem item{WorkItem::Kind::kDecode, 4096, Lane::kFetched, 1};
  const EngineOptions engine = EngineOptionsOf(options);
  HEADROOM_ASSIGN_OR_RETURN(ModelConfig config, ConfigOf(engine));
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<BenchEngine> measured,
                            BenchEngine::Create(engine, std::move(config), {item}));
  return measured->Calibrate();
}

int RunBench(const BenchOptions& options, const cli::FlagSources& sources) {
  const auto fail = [&sources](const absl::Status& status, int exit_code) {
    std::fprintf(stderr, "headroom bench: %s\n",
                 std::string(sources.Explain(status).message()).c_str());
    return exit_code;
  };
  if (const absl::Status status = CheckOptions(options); !status.ok()) return fail(status, 2);
  const absl::StatusOr<std::vector<WorkItem>> items = ItemsOf(options);
  if (!items.ok()) return fail(items.status(), 2);
  if (!options.trace_path.empty()) {
    const absl::Status started = StartTrace(options.trace_path, "bench");
    if (!started.ok()) return fail(started, 2);
  }
  const absl::Status status = MeasureAll(options, *items);
  StopTrace();
  return status.ok() ? 0 : fail(status, cli::ExitCodeOfStart(status));
}

}  // namespace headroom
