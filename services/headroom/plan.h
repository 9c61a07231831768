// `headroom plan`: what a context would take, and how long a step, before anything is served. Pure but
// for reading config.json and for what the caller measures.
#ifndef HEADROOM_SERVICES_HEADROOM_PLAN_H_
#define HEADROOM_SERVICES_HEADROOM_PLAN_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "common/json.h"
#include "services/coordinator/placement/predict.h"
#include "services/headroom/flags.h"
#include "services/worker/device_budget.h"
#include "services/worker/model/model_config.h"

namespace headroom::cli {

struct PlanOptions {
  std::string model_dir;
  int64_t context_tokens = 0;  // of the prompt
  int64_t max_tokens = 0;      // of the answer
  int64_t sequences = 1;
  int64_t gpu_memory_bytes = 0;
  int64_t host_memory_bytes = 0;
  std::string placement = "auto";
  int64_t max_chunk_tokens = kMaxChunkTokens;
  // No decode steps are run to find what they cost on this device, and no time is predicted.
  bool no_measure = false;
  std::string device = "auto";
  kernels::ElementType product_type = kernels::ElementType::kFloat32;  // of that device
  int32_t threads = 0;
  bool json = false;
};

struct PlanReport {
  PlanOptions options;
  ModelConfig config;
  DeviceBudget budget;
  coordinator::Prediction prediction;
  LaneCosts costs;              // unknown: not measured
  std::string why_no_costs;     // if that failed

  bool fits() const { return prediction.does_not_fit.empty(); }
};

void AddPlanFlags(Flags& flags, PlanOptions* options);

// What decode steps cost here: `headroom plan` measures it with the model's own weights.
using MeasureCosts = std::function<absl::StatusOr<LaneCosts>(const PlanOptions&)>;

// INVALID_ARGUMENT: an option or the model's config.json is wrong. RESOURCE_EXHAUSTED:
// --gpu-memory is below what the model needs at all; says how much that is. What `measure` fails with
// is part of the report: a folder without weights can be planned for.
absl::StatusOr<PlanReport> MakePlan(const PlanOptions& options, const MeasureCosts& measure);
std::string PlanAsText(const PlanReport& report);
Json PlanAsJson(const PlanReport& report);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_PLAN_H_
