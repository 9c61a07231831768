#include "services/headroom/plan.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/bytes_text.h"
#include "common/checked_math.h"
#include "common/status.h"
#include "kernels/gemm.h"
#include "services/headroom/lane_text.h"
#include "services/worker/model/weights.h"

namespace headroom::cli {
namespace {

// Of one sequence, and of all: planning looks at each extent border.
constexpr int64_t kMostTokens = int64_t{1} << 24;
constexpr int64_t kMostTokensOfAll = int64_t{1} << 28;
constexpr int64_t kMostSequences = 1024;

absl::Status CheckRange(const PlanOptions& options) {
  const auto check = [](const char* flag, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", value, ", expected ", low, " to ", high));
  };
  HEADROOM_RETURN_IF_ERROR(check("--context", options.context_tokens, 1, kMostTokens));
  HEADROOM_RETURN_IF_ERROR(check("--max-tokens", options.max_tokens, 0, kMostTokens));
  HEADROOM_RETURN_IF_ERROR(check("--sequences", options.sequences, 1, kMostSequences));
  return check("--sequences times --context and --max-tokens:",
               options.sequences * (options.context_tokens + options.max_tokens), 1,
               kMostTokensOfAll);
}

double TotalBytes(const coordinator::Prediction& prediction) {
  double total = 0;
  for (const auto& lane : prediction.lanes) total += static_cast<double>(lane.bytes);
  return total > 0 ? total : 1;
}

}  // namespace

void AddPlanFlags(Flags& flags, PlanOptions* options) {
  flags.Group("What is to be served");
  flags.Text("model", "DIR", &options->model_dir, "Folder of the model. Without weights in it no time is predicted.");
  flags.Integer("context", &options->context_tokens, 1, kMostTokens, "Tokens of the prompt.",
                "none, must be set");
  flags.Integer("max-tokens", &options->max_tokens, 0, kMostTokens, "Tokens of the answer.");
  flags.Integer("sequences", &options->sequences, 1, kMostSequences,
                "Such sequences side by side.");
  flags.Text("placement", "WHERE", &options->placement,
             "auto, resident, fetched, in-place, or LANE=SHARE,...; see generate.");
  flags.Group("What there is");
  flags.Bytes("gpu-memory", &options->gpu_memory_bytes, "Device memory of the worker.",
              "none, must be set");
  flags.Bytes("host-memory", &options->host_memory_bytes, "Host memory of the kvstore.",
              "none, must be set");
  flags.Integer("max-chunk-tokens", &options->max_chunk_tokens, kMinChunkTokens, kMaxChunkTokens,
                "As the worker's.");
  flags.Choice("device", {"auto", "cpu", "cuda"}, &options->device, "As the worker's.");
  flags.Integer("threads", &options->threads, 0, 1024, "As the worker's.", "as many as may run");
  flags.Switch("no-measure", &options->no_measure,
               "Loads no weights and runs no steps, which takes some seconds; no time is predicted.");
  flags.Group("Output");
  flags.Switch("json", &options->json, "One JSON object in place of the text.");
}

absl::StatusOr<PlanReport> MakePlan(const PlanOptions& options, const MeasureCosts& measure) {
  PlanReport report;
  report.options = options;
  HEADROOM_RETURN_IF_ERROR(CheckRange(options));
  HEADROOM_ASSIGN_OR_RETURN(report.config, ReadModelConfig(options.model_dir));
  if (!CheckedMul(report.config.kv_geometry().BytesPerToken(), 2 * kMostTokensOfAll)) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.model_dir, "/config.json: keys and values of one token take ",
                     report.config.kv_geometry().BytesPerToken(), " bytes"));
  }
  absl::StatusOr<coordinator::PlacementSpec> spec = coordinator::ParsePlacement(options.placement);
  if (!spec.ok()) return Annotate(spec.status(), "--placement");
  HEADROOM_ASSIGN_OR_RETURN(
      report.budget,
      DivideBudget(report.config, WeightBytes(report.config, kernels::PackedWeightBytes),
                   options.gpu_memory_bytes, options.max_chunk_tokens,
                   report.config.max_position_tokens,
                   options.product_type));
  coordinator::PredictInput input;
  input.extents = {report.config.kv_geometry(), report.config.windows,
                   report.budget.max_chunk_tokens};
  input.spec = *spec;
  input.num_sequences = options.sequences;
  input.prompt_tokens = options.context_tokens;
  input.max_tokens = options.max_tokens;
  input.pool_bytes = report.budget.kv_pool_bytes;
  input.tail_bytes_per_sequence = report.budget.tail_bytes_per_sequence;
  input.host_capacity_bytes = options.host_memory_bytes;
  if (!options.no_measure) {
    const absl::StatusOr<LaneCosts> costs = measure(options);
    if (costs.ok()) report.costs = *costs;
    if (!costs.ok()) report.why_no_costs = std::string(costs.status().message());
  }
  input.costs = report.costs;
  report.prediction = coordinator::Predict(input);
  const int64_t tokens = options.context_tokens + options.max_tokens;
  if (tokens > report.config.max_position_tokens) {
    report.prediction.does_not_fit.push_back(
        absl::StrCat("a sequence of ", tokens, " tokens, the model was trained for ",
                     report.config.max_position_tokens, ": lower --context or --max-tokens"));
  }
  return report;
}

std::string PlanAsText(const PlanReport& report) {
  const PlanOptions& options = report.options;
  const ModelConfig& config = report.config;
  const DeviceBudget& budget = report.budget;
  const coordinator::Prediction& prediction = report.prediction;
  std::string text = absl::StrFormat(
      "%s: %d layers of %d KV heads of %d: %s of keys and values a token\n", config.architecture,
      config.num_layers, config.num_kv_heads, config.head_dim,
      FormatBytes(config.kv_geometry().BytesPerToken()));
  absl::StrAppendFormat(&text, "%d sequence%s of %d tokens of prompt and %d of answer\n\n",
                        options.sequences, options.sequences == 1 ? "" : "s",
                        options.context_tokens, options.max_tokens);
  absl::StrAppendFormat(&text, "%-10s %18s %24s %7s\n", "lane", "KV heads per layer",
                        "bytes of one decode step", "share");
  const double total = TotalBytes(prediction);
  for (int lane = 0; lane < coordinator::kNumLanes; ++lane) {
    const coordinator::LanePrediction& use = prediction.lanes[lane];
    absl::StrAppendFormat(&text, "%-10s %18.2f %24s %6.1f%%\n",
                          coordinator::LaneName(static_cast<coordinator::Lane>(lane)),
                          use.kv_heads, FormatBytes(use.bytes),
                          100 * static_cast<double>(use.bytes) / total);
  }
  if (report.costs.known()) {
    const double batch = static_cast<double>(options.sequences);
    absl::StrAppendFormat(&text,
                          "\na decode step after the prompt: %.2f ms predicted, %.1f tokens a second\n",
                          1e3 * prediction.step_seconds, batch / prediction.step_seconds);
    absl::StrAppendFormat(&text, "measured here: %.2f ms without keys", 1e3 * report.costs.base_seconds);
    if (report.costs.resident_base_seconds > 0) {
      absl::StrAppendFormat(&text, " (%.2f where all are resident)",
                            1e3 * report.costs.resident_base_seconds);
    }
    text += ", then";
    for (int lane = 0; lane < coordinator::kNumLanes; ++lane) {
      const double cost = report.costs.seconds_per_byte[lane];
      absl::StrAppendFormat(&text, "%s %s %.1f GB/s", lane == 0 ? "" : ",",
                            coordinator::LaneName(static_cast<coordinator::Lane>(lane)),
                            cost > 0 ? 1e-9 / cost : 0);
    }
    text += '\n';
  } else if (!report.why_no_costs.empty()) {
    absl::StrAppend(&text, "\nno time is predicted: ", report.why_no_costs, "\n");
  }
  const auto line = [&text](const char* name, int64_t bytes, const char* note = "") {
    absl::StrAppendFormat(&text, "%-16s %11s%s\n", name, FormatBytes(bytes), note);
  };
  text += '\n';
  line("device memory", budget.budget_bytes);
  line("  weights", budget.weights_bytes);
  line("  staging ring", budget.ring_bytes);
  line("  activations", budget.activation_bytes,
       absl::StrCat("  (chunks of ", budget.max_chunk_tokens, " tokens)").c_str());
  line("  KV pool", budget.kv_pool_bytes);
  line("    tails", prediction.tail_bytes);
  line("    resident", prediction.resident_bytes);
  line("host memory", options.host_memory_bytes);
  line("  extents", prediction.host_bytes);
  text += '\n';
  if (report.fits()) text += "all of it fits\n";
  for (const std::string& what : prediction.does_not_fit) {
    absl::StrAppend(&text, "does not fit: ", what, "\n");
  }
  return text;
}

Json PlanAsJson(const PlanReport& report) {
  const DeviceBudget& budget = report.budget;
  const coordinator::Prediction& prediction = report.prediction;
  const double total = TotalBytes(prediction);
  Json::Object lanes;
  for (int lane = 0; lane < coordinator::kNumLanes; ++lane) {
    const coordinator::LanePrediction& use = prediction.lanes[lane];
    lanes.emplace_back(LaneKey(coordinator::LaneName(static_cast<coordinator::Lane>(lane))),
                       Json::Object{{"kv_heads", use.kv_heads},
                                    {"bytes", use.bytes},
                                    {"share", static_cast<double>(use.bytes) / total}});
  }
  Json::Array does_not_fit;
  for (const std::string& what : prediction.does_not_fit) does_not_fit.emplace_back(what);
  return Json::Object{
      {"fits", report.fits()},
      {"does_not_fit", std::move(does_not_fit)},
      {"lanes", std::move(lanes)},
      {"step_seconds", prediction.step_seconds},
      {"gpu_memory", Json::Object{{"budget_bytes", budget.budget_bytes},
                                  {"weights_bytes", budget.weights_bytes},
                                  {"ring_bytes", budget.ring_bytes},
                                  {"activation_bytes", budget.activation_bytes},
                                  {"kv_pool_bytes", budget.kv_pool_bytes},
                                  {"tail_bytes", prediction.tail_bytes},
                                  {"resident_bytes", prediction.resident_bytes},
                                  {"max_chunk_tokens", budget.max_chunk_tokens}}},
      {"host_memory", Json::Object{{"capacity_bytes", report.options.host_memory_bytes},
                                   {"extent_bytes", prediction.host_bytes}}}};
}

}  // namespace headroom::cli
