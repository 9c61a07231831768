#include "services/headroom/bench/report.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr double kMilli = 1e3;
constexpr double kGiga = 1e9;
constexpr double kMebi = 1 << 20;

Json LaneJson(const Measurement& measurement, Lane lane) {
  const int i = static_cast<int>(lane);
  return Json::Object{{"bytes", measurement.lane_bytes[i]},
                      {"busy_seconds", measurement.lane_busy_seconds[i]},
                      {"idle_seconds", measurement.lane_idle_seconds[i]}};
}

void PrintLane(const Measurement& measurement, Lane lane) {
  const int i = static_cast<int>(lane);
  if (measurement.lane_bytes[i] == 0) return;
  std::printf("    %-9s %9.2f MB, busy %8.2f ms, idle %8.2f ms, %5.1f GB/s while busy\n",
              std::string(LaneName(lane)).c_str(), measurement.lane_bytes[i] * 1e-6,
              measurement.lane_busy_seconds[i] * kMilli, measurement.lane_idle_seconds[i] * kMilli,
              measurement.lane_bytes[i] / measurement.lane_busy_seconds[i] / kGiga);
}

Json CeilingsJson(const Ceilings& ceilings) {
  Json::Object object;
  for (const CeilingField& field : kCeilingFields) {
    const double value = ceilings.*field.value;
    if (value > 0) object.emplace_back(absl::StrCat(field.name, "_per_second"), value);
  }
  return object;
}

const char* TypeOf(WorkItem::Kind kind) {
  switch (kind) {
    case WorkItem::Kind::kPrefill: return "prefill";
    case WorkItem::Kind::kQuestion: return "question";
    case WorkItem::Kind::kBeside: return "beside";
    case WorkItem::Kind::kDecode: break;
  }
  return "decode";
}

Json TokensBesideJson(const Measurement& measurement) {
  const std::vector<double>& tokens = measurement.token_seconds;
  if (tokens.empty()) return nullptr;
  return Json::Object{{"count", static_cast<int64_t>(tokens.size())},
                      {"p50_seconds", Percentile(tokens, 50)},
                      {"p99_seconds", Percentile(tokens, 99)},
                      {"most_seconds", tokens.back()}};
}

void PrintCeilings(const BenchResult& result) {
  const Ceilings& c = result.ceilings;
  std::printf("    machine   %9.1f GFLOP/s GEMM, %.1f GFLOP/s attention, %.1f GB/s reads, "
              "%.1f GB/s copies, %.1f GB/s host reads\n",
              c.gemm_flops / kGiga, c.attention_flops / kGiga, c.read_bytes / kGiga,
              c.copy_bytes / kGiga, c.host_read_bytes / kGiga);
  if (c.copy_back_bytes > 0) {
    std::printf("    copies    %9.1f GB/s in pieces of 256 KiB, %.1f of 1 MiB, %.1f of 4 MiB; %.1f "
                "GB/s back, %.1f both ways; %.1f beside host reads, in sum\n",
                c.copy_256kib_bytes / kGiga, c.copy_1mib_bytes / kGiga, c.copy_4mib_bytes / kGiga,
                c.copy_back_bytes / kGiga, c.copy_both_bytes / kGiga,
                c.both_links_bytes / kGiga);
  }
  for (const CeilingField& field : kCeilingFields) {
    const double value = c.*field.value, floor = result.floor_ceilings.*field.value;
    if (value >= floor) continue;
    std::printf("    LOW       %9.1f G%s/s was measured; the floor takes %.1f, what the card is "
                "known for\n",
                value / kGiga, field.name, floor / kGiga);
  }
}

}  // namespace

const Measurement& BenchResult::median() const {
  std::vector<const Measurement*> ordered;
  for (const Measurement& measurement : measurements) ordered.push_back(&measurement);
  std::sort(ordered.begin(), ordered.end(),
            [](const auto* a, const auto* b) { return a->seconds < b->seconds; });
  return *ordered[(ordered.size() - 1) / 2];
}

Spread BenchResult::seconds() const {
  std::vector<double> values;
  for (const Measurement& measurement : measurements) values.push_back(measurement.seconds);
  return SpreadOf(std::move(values));
}

double BenchResult::predicted_seconds() const {
  std::vector<double> values;
  for (const Measurement& measurement : measurements) values.push_back(measurement.predicted_seconds);
  return SpreadOf(std::move(values)).median;
}

double BenchResult::prediction_off() const {
  std::vector<double> values;
  for (const Measurement& measurement : measurements) {
    if (measurement.predicted_seconds == 0) return 0;
    values.push_back(measurement.predicted_seconds / measurement.seconds - 1);
  }
  return SpreadOf(std::move(values)).median;
}

double BenchResult::tokens() const {
  return item.kind == WorkItem::Kind::kPrefill ? static_cast<double>(median().prefilled_tokens)
                                               : item.batch;
}

bool BenchResult::cut_off() const {
  return item.prefills() && median().prefilled_tokens < item.context_tokens;
}

Json ToJson(const BenchSetup& setup) {
  const DeviceBudget& budget = setup.budget;
  return Json::Object{
      {"type", "setup"},
      {"model", setup.model},
      {"device", setup.device},
      {"threads", int64_t{setup.threads}},
      {"chunk_tokens", setup.chunk_tokens},
      {"gpu_memory", Json::Object{{"budget_bytes", budget.budget_bytes},
                                  {"weights_bytes", budget.weights_bytes},
                                  {"ring_bytes", budget.ring_bytes},
                                  {"activation_bytes", budget.activation_bytes},
                                  {"kv_pool_bytes", budget.kv_pool_bytes}}},
      {"known_ceilings", CeilingsJson(setup.known)},
      {"decode_keys", "generated, not prefilled"},
      {"prepare_seconds", setup.prepare_seconds}};
}

Json ToJson(const BenchResult& result) {
  const Spread seconds = result.seconds();
  const Measurement& median = result.median();
  return Json::Object{
      {"type", TypeOf(result.item.kind)},
      {"work", result.item.ToString()},
      {"context_tokens", result.item.context_tokens},
      {"lane", WhereName(result.item)},
      {"batch", int64_t{result.item.batch}},
      {"repeats", static_cast<int64_t>(result.measurements.size())},
      {"seconds", Json::Object{{"median", seconds.median},
                               {"least", seconds.least},
                               {"most", seconds.most}}},
      {"tokens_per_second", result.tokens() / seconds.median},
      {"prefilled_tokens", median.prefilled_tokens},
      {"prefill_seconds", median.prefill_seconds},
      {"tokens_beside", TokensBesideJson(median)},
      {"cut_off", result.cut_off()},
      {"floor_seconds", result.floor_seconds},
      {"predicted_seconds", result.predicted_seconds()},
      {"prediction_off", result.prediction_off()},
      {"ratio", seconds.median / result.floor_seconds},
      {"least_ratio", seconds.least / result.floor_seconds},
      {"ceilings", CeilingsJson(result.ceilings)},
      {"floor_ceilings", CeilingsJson(result.floor_ceilings)},
      {"costs", Json::Object{{"linear_flops", result.costs.linear_flops},
                             {"attention_flops", result.costs.attention_flops},
                             {"weight_bytes", result.costs.weight_bytes},
                             {"kv_bytes", result.costs.kv_bytes},
                             {"copied_bytes", result.costs.copied_bytes},
                             {"in_place_bytes", result.costs.in_place_bytes}}},
      {"lanes", Json::Object{{"resident", LaneJson(median, Lane::kResident)},
                             {"fetched", LaneJson(median, Lane::kFetched)},
                             {"in_place", LaneJson(median, Lane::kInPlace)}}},
      {"fetch_wait_seconds", median.fetch_wait_seconds},
      {"in_place_wait_seconds", median.in_place_wait_seconds},
      {"sealed_bytes", median.sealed_bytes},
      {"cpu_seconds", median.cpu_seconds},
      {"gpu_memory_peak_bytes", result.peak_bytes},
      {"gpu_memory_beside_arena_bytes", result.beside_arena_bytes}};
}

absl::StatusOr<BenchReport> BenchReport::Open(const std::string& json_path) {
  BenchReport report;
  report.json_path_ = json_path;
  if (!json_path.empty()) {
    report.json_ = std::fopen(json_path.c_str(), "we");
    if (report.json_ == nullptr) {
      return absl::ErrnoToStatus(errno, absl::StrCat("--json ", json_path));
    }
  }
  return report;
}

BenchReport::BenchReport(BenchReport&& other) noexcept
    : json_path_(std::move(other.json_path_)), json_(std::exchange(other.json_, nullptr)) {}

BenchReport::~BenchReport() {
  if (json_ != nullptr) std::fclose(json_);
}

absl::Status BenchReport::Begin(const BenchSetup& setup) {
  const DeviceBudget& budget = setup.budget;
  std::printf(
      "%s on %s, %d threads, chunks of %ld tokens\n"
      "device memory %.0f MiB: weights %.0f, ring %.0f, activations %.0f, KV %.0f MiB\n"
      "prefill's floor: linear FLOPs at the GEMM's rate, attention's at attention's. decode's:\n"
      "weights, keys and values at the read rate, what is copied at the copy rate: %s.\n"
      "keys of decode items are generated, not prefilled; prepared in %.1f s\n"
      "\n%-26s %12s %18s %10s %10s %7s %7s\n",
      setup.model.c_str(), setup.device.c_str(), setup.threads,
      static_cast<long>(setup.chunk_tokens), static_cast<double>(budget.budget_bytes) / kMebi,
      static_cast<double>(budget.weights_bytes) / kMebi,
      static_cast<double>(budget.ring_bytes) / kMebi,
      static_cast<double>(budget.activation_bytes) / kMebi,
      static_cast<double>(budget.kv_pool_bytes) / kMebi,
      setup.gpu ? "side by side, the longest counts" : "the sum", setup.prepare_seconds, "work",
      "median ms", "least..most ms", "tok/s", "floor ms", "ratio", "least");
  std::fflush(stdout);
  return WriteJson(ToJson(setup));
}

void BenchReport::PrintPlan(const WorkItem& item, double step_seconds,
                            const double (&lane_bytes)[kNumLanes]) {
  std::printf("%-26s %9.2f ms predicted%s:", item.ToString().c_str(), step_seconds * kMilli,
              item.kind == WorkItem::Kind::kQuestion ? " for a decode step" : "");
  for (int lane = 0; lane < kNumLanes; ++lane) {
    std::printf(" %s %.1f MB%s", std::string(LaneName(static_cast<Lane>(lane))).c_str(),
                lane_bytes[lane] * 1e-6, lane + 1 < kNumLanes ? "," : "\n");
  }
  std::fflush(stdout);
}

absl::Status BenchReport::AddChunk(const WorkItem& item, int64_t tokens, double seconds) {
  constexpr double kSayEverySeconds = 10;
  if (seconds < said_at_) said_at_ = 0;  // another prefill
  if (seconds >= said_at_ + kSayEverySeconds) {
    said_at_ = seconds;
    std::printf("%-26s %ld tokens after %.1f s\n", item.ToString().c_str(),
                static_cast<long>(tokens), seconds);
    std::fflush(stdout);
  }
  return WriteJson(Json::Object{{"type", "chunk"},
                                {"work", item.ToString()},
                                {"prefilled_tokens", tokens},
                                {"seconds", seconds}});
}

absl::Status BenchReport::Add(const BenchResult& result) {
  const Spread seconds = result.seconds();
  const Measurement& median = result.median();
  const Costs& costs = result.costs;
  std::printf("%-26s %12.2f %9.2f..%-8.2f %9.1f %10.2f %6.2fx %6.2fx\n",
              result.item.ToString().c_str(), seconds.median * kMilli, seconds.least * kMilli,
              seconds.most * kMilli, result.tokens() / seconds.median,
              result.floor_seconds * kMilli, seconds.median / result.floor_seconds,
              seconds.least / result.floor_seconds);
  if (result.cut_off()) {
    std::printf("    CUT OFF   after %ld of %ld tokens, by --stop-after: all figures are of those\n",
                static_cast<long>(median.prefilled_tokens), static_cast<long>(result.item.context_tokens));
  }
  PrintCeilings(result);
  std::printf(
      "    costs     %9.2f GFLOP linear, %.2f GFLOP attention, %.1f MB weights, %.1f MB keys and "
      "values, %.1f MB copied\n",
      costs.linear_flops / kGiga, costs.attention_flops / kGiga, costs.weight_bytes * 1e-6,
      costs.kv_bytes * 1e-6, costs.copied_bytes * 1e-6);
  if (const double predicted_seconds = result.predicted_seconds(); predicted_seconds > 0) {
    std::printf("    plan      %9.2f ms predicted, %+.1f%% off\n", predicted_seconds * kMilli,
                100 * result.prediction_off());
  }
  if (!median.token_seconds.empty()) {
    const std::vector<double>& tokens = median.token_seconds;
    std::printf("    beside    a prefill of %ld tokens in %.2f s: %zu tokens, p50 %.2f ms, p99 %.2f ms, "
                "at most %.2f ms\n",
                static_cast<long>(median.prefilled_tokens), median.prefill_seconds, tokens.size(),
                Percentile(tokens, 50) * kMilli, Percentile(tokens, 99) * kMilli,
                tokens.back() * kMilli);
  }
  PrintLane(median, Lane::kResident);
  PrintLane(median, Lane::kFetched);
  PrintLane(median, Lane::kInPlace);
  std::printf(
      "    waited    %9.2f ms for tiles, %.2f ms for keys in place; %.1f MB sealed; %.2f ms of "
      "processor time; device memory %.0f MiB at most, %.0f of it beside the arena\n",
      median.fetch_wait_seconds * kMilli, median.in_place_wait_seconds * kMilli,
      median.sealed_bytes * 1e-6, median.cpu_seconds * kMilli,
      static_cast<double>(result.peak_bytes) / kMebi,
      static_cast<double>(result.beside_arena_bytes) / kMebi);
  std::fflush(stdout);
  return WriteJson(ToJson(result));
}

absl::Status BenchReport::WriteJson(const Json& object) {
  if (json_ == nullptr) return absl::OkStatus();
  const std::string line = object.Dump() + "\n";
  if (std::fwrite(line.data(), 1, line.size(), json_) != line.size() || std::fflush(json_) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("--json ", json_path_));
  }
  return absl::OkStatus();
}

}  // namespace headroom
