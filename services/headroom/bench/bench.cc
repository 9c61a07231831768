#include "services/headroom/bench/bench.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/device/device_factory.h"
#include "common/status.h"
#include "services/headroom/bench/ceilings.h"
#include "services/headroom/bench/costs.h"
#include "services/headroom/bench/engine.h"
#include "services/headroom/bench/report.h"
#include "services/headroom/bench/work_item.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

constexpr int32_t kMaxThreads = 1024;
constexpr int64_t kMaxGpuMemoryBytes = int64_t{1} << 50;

absl::Status CheckOptions(const BenchOptions& options) {
  const auto range = [](absl::string_view flag, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", value, ", expected ", low, " to ", high));
  };
  if (options.model_dir.empty()) return absl::InvalidArgumentError("--model is not set");
  HEADROOM_RETURN_IF_ERROR(range("--threads", options.threads, 0, kMaxThreads));
  HEADROOM_RETURN_IF_ERROR(
      range("--gpu-memory", options.gpu_memory_bytes, 0, kMaxGpuMemoryBytes));
  HEADROOM_RETURN_IF_ERROR(
      range("--chunk-tokens", options.chunk_tokens, kMinChunkTokens, kMaxChunkTokens));
  return range("--repeat", options.repeat, kMinBenchRepeats, kMaxBenchRepeats);
}

int32_t UsableThreads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::clamp(CPU_COUNT(&set), 1, int{kMaxThreads});
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

absl::StatusOr<BenchResult> MeasureItem(const WorkItem& item, int32_t repeat, BenchEngine& engine,
                                        CpuCeilingProbe& probe) {
  BenchResult result;
  result.item = item;
  if (item.planned) {  // said before anything of the item runs
    HEADROOM_ASSIGN_OR_RETURN(const BenchEngine::Planned planned, engine.PlanFor(item));
    result.predicted_seconds = planned.step_seconds;
    BenchReport::PrintPlan(item, planned.step_seconds, planned.lane_bytes);
  }
  HEADROOM_ASSIGN_OR_RETURN(const Ceilings before, probe.Measure());
  for (int32_t i = 0; i < repeat; ++i) {
    HEADROOM_ASSIGN_OR_RETURN(Measurement measurement, engine.Measure(item));
    result.measurements.push_back(measurement);
  }
  HEADROOM_ASSIGN_OR_RETURN(const Ceilings after, probe.Measure());
  result.ceilings = Larger(before, after);
  const bool prefill = item.kind == WorkItem::Kind::kPrefill;
  result.costs = prefill ? PrefillCosts(engine.config(), item.context_tokens)
                         : DecodeCosts(engine.config(), BenchEngine::MeanDecodeContext(item),
                                       item.batch);
  result.costs.copied_bytes = result.median().lane_bytes[static_cast<int>(Lane::kFetched)];
  result.floor_seconds = prefill ? PrefillFloorSeconds(result.costs, result.ceilings)
                                 : DecodeFloorSeconds(result.costs, result.ceilings);
  // The arena is carved at start; what of its KV pool was never used is no need.
  const StepExecutor::Memory memory = engine.memory();
  result.peak_bytes =
      memory.arena.used_bytes - memory.kv_pool_bytes + memory.kv_pool_high_water_bytes;
  return result;
}

absl::Status MeasureAll(const BenchOptions& options, const std::vector<WorkItem>& items) {
  if (ChooseDevice(options.device) == "cuda") {
    return absl::UnavailableError("--device cuda: the bench measures the CPU device, --device cpu");
  }
  HEADROOM_ASSIGN_OR_RETURN(BenchReport report, BenchReport::Open(options.json_path));
  EngineOptions engine_options;
  engine_options.model_dir = options.model_dir;
  engine_options.device = options.device;
  engine_options.threads = options.threads != 0 ? options.threads : UsableThreads();
  engine_options.gpu_memory_bytes = options.gpu_memory_bytes;
  engine_options.chunk_tokens = options.chunk_tokens;
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<BenchEngine> engine,
                            BenchEngine::Create(engine_options, items));
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<CpuCeilingProbe> probe,
                            CpuCeilingProbe::Create(engine_options.threads));
  BenchSetup setup;
  setup.model = options.model_dir;
  setup.device = std::string(engine->device_name());
  setup.threads = engine_options.threads;
  setup.chunk_tokens = engine->PrefillChunkTokens();
  setup.budget = engine->budget();
  HEADROOM_RETURN_IF_ERROR(report.Begin(setup));
  for (const WorkItem& item : items) {
    HEADROOM_ASSIGN_OR_RETURN(const BenchResult result,
                              MeasureItem(item, options.repeat, *engine, *probe));
    HEADROOM_RETURN_IF_ERROR(report.Add(result));
  }
  return absl::OkStatus();
}

int Fail(const absl::Status& status, int exit_status) {
  std::fprintf(stderr, "headroom bench: %s\n", std::string(status.message()).c_str());
  return exit_status;
}

}  // namespace

absl::StatusOr<LaneCosts> MeasureLaneCosts(const BenchOptions& options) {
  EngineOptions engine;
  engine.model_dir = options.model_dir;
  engine.device = options.device;
  engine.threads = options.threads != 0 ? options.threads : UsableThreads();
  engine.gpu_memory_bytes = options.gpu_memory_bytes;
  engine.chunk_tokens = options.chunk_tokens;
  // Lays out a segment that is larger than the caches.
  const WorkItem item{WorkItem::Kind::kDecode, 4096, Lane::kFetched, 1};
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<BenchEngine> measured,
                            BenchEngine::Create(engine, {item}));
  return measured->Calibrate();
}

int RunBench(const BenchOptions& options) {
  if (const absl::Status status = CheckOptions(options); !status.ok()) return Fail(status, 2);
  const absl::StatusOr<std::vector<WorkItem>> items = ItemsOf(options);
  if (!items.ok()) return Fail(items.status(), 2);
  const absl::Status status = MeasureAll(options, *items);
  return status.ok() ? 0 : Fail(status, 1);
}

}  // namespace headroom
