// `headroom plan`: what a context would take, before anything runs. Pure but for reading
// config.json.
#ifndef HEADROOM_SERVICES_HEADROOM_PLAN_H_
#define HEADROOM_SERVICES_HEADROOM_PLAN_H_

#include <cstdint>
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
  bool json = false;
};

struct PlanReport {
  PlanOptions options;
  ModelConfig config;
  DeviceBudget budget;
  coordinator::Prediction prediction;

  bool fits() const { return prediction.does_not_fit.empty(); }
};

void AddPlanFlags(Flags& flags, PlanOptions* options);

// INVALID_ARGUMENT: an option or the model's config.json is wrong. RESOURCE_EXHAUSTED:
// --gpu-memory is below what the model needs at all; says how much that is.
absl::StatusOr<PlanReport> MakePlan(const PlanOptions& options);
std::string PlanAsText(const PlanReport& report);
Json PlanAsJson(const PlanReport& report);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_PLAN_H_
