#include "services/headroom/status_report.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_format.h"
#include "common/bytes_text.h"
#include "services/headroom/lane_text.h"

namespace headroom::cli {
namespace {

// Ids of lives are random: as JSON numbers beyond 2^53 they would be rounded.
std::string LifeText(uint64_t life) { return absl::StrFormat("%016x", life); }

std::string FormatUnsigned(uint64_t bytes) { return FormatBytes(static_cast<int64_t>(bytes)); }

}  // namespace

Json StatusAsJson(const v1::GetStatusResponse& status) {
  Json::Array processes;
  for (const v1::ProcessStatus& process : status.processes()) {
    processes.emplace_back(Json::Object{{"name", process.name()},
                                     {"connected", process.connected()},
                                     {"address", process.address()},
                                     {"life", LifeText(process.life())},
                                     {"message", process.message()}});
  }
  const v1::DeviceMemory& memory = status.device_memory();
  const v1::InPlaceCounters& in_place = status.in_place();
  Json::Object lanes;
  for (const v1::LaneUse& use : status.lanes()) {
    lanes.emplace_back(LaneKey(LaneText(use.lane())),
                       Json::Object{{"bytes", use.bytes()},
                                    {"busy_ns", use.busy_ns()},
                                    {"idle_ns", use.idle_ns()}});
  }
  return Json::Object{
      {"version", status.version()},
      {"model", status.model()},
      {"device", status.device()},
      {"processes", std::move(processes)},
      {"device_memory",
       Json::Object{{"budget_bytes", memory.budget_bytes()},
                    {"weights_bytes", memory.weights_bytes()},
                    {"ring_bytes", memory.ring_bytes()},
                    {"activation_bytes", memory.activation_bytes()},
                    {"kv_pool_bytes", memory.kv_pool_bytes()},
                    {"tail_bytes_per_sequence", memory.tail_bytes_per_sequence()},
                    {"kv_pool_high_water_bytes", memory.kv_pool_high_water_bytes()},
                    {"high_water_bytes", memory.high_water_bytes()},
                    {"registered_host_bytes", memory.registered_host_bytes()}}},
      {"host_capacity_bytes", static_cast<int64_t>(status.host_capacity_bytes())},
      {"host_used_bytes", static_cast<int64_t>(status.host_used_bytes())},
      {"running_requests", status.running_requests()},
      {"waiting_requests", status.waiting_requests()},
      {"sessions", status.sessions()},
      {"plan_version", static_cast<int64_t>(status.plan().version())},
      {"lanes", std::move(lanes)},
      {"steps", status.steps()},
      {"prompt_tokens", status.prompt_tokens()},
      {"generated_tokens", status.generated_tokens()},
      {"retried_steps", status.retried_steps()},
      {"plans_built", status.plans_built()},
      {"plans_at_start", status.plans_at_start()},
      {"in_place",
       Json::Object{{"posts", static_cast<int64_t>(in_place.posts())},
                    {"refused", static_cast<int64_t>(in_place.refused())},
                    {"late_partials", static_cast<int64_t>(in_place.late_partials())},
                    {"bytes", static_cast<int64_t>(in_place.bytes())},
                    {"busy_ns", static_cast<int64_t>(in_place.busy_ns())}}}};
}

std::string StatusAsText(const v1::GetStatusResponse& status) {
  std::string text = absl::StrFormat("headroom %s serves %s on %s\n\n", status.version(),
                                     status.model(), status.device());
  for (const v1::ProcessStatus& process : status.processes()) {
    absl::StrAppendFormat(&text, "  %-12s %-13s %s%s%s\n", process.name(),
                          process.connected() ? "connected" : "NOT CONNECTED", process.address(),
                          process.message().empty() ? "" : ": ", process.message());
  }
  absl::StrAppendFormat(&text, "\nrequests       %d running, %d waiting; %d sessions\n",
                        status.running_requests(), status.waiting_requests(), status.sessions());
  const v1::DeviceMemory& memory = status.device_memory();
  absl::StrAppendFormat(&text, "device memory  %s, at most %s of it in use\n",
                        FormatBytes(memory.budget_bytes()), FormatBytes(memory.high_water_bytes()));
  absl::StrAppendFormat(&text, "  weights      %s\n  ring         %s\n  activations  %s\n",
                        FormatBytes(memory.weights_bytes()), FormatBytes(memory.ring_bytes()),
                        FormatBytes(memory.activation_bytes()));
  absl::StrAppendFormat(&text, "  KV pool      %s, at most %s of it in use; a tail takes %s\n",
                        FormatBytes(memory.kv_pool_bytes()),
                        FormatBytes(memory.kv_pool_high_water_bytes()),
                        FormatBytes(memory.tail_bytes_per_sequence()));
  absl::StrAppendFormat(&text, "host memory    %s of %s in use; registered with the device: %s\n",
                        FormatUnsigned(status.host_used_bytes()),
                        FormatUnsigned(status.host_capacity_bytes()),
                        FormatBytes(memory.registered_host_bytes()));
  absl::StrAppendFormat(&text, "since the start: %d steps, %d tokens of prompts, %d of answers\n",
                        status.steps(), status.prompt_tokens(), status.generated_tokens());
  for (const v1::LaneUse& use : status.lanes()) {
    const double seconds = static_cast<double>(use.busy_ns()) / 1e9;
    const double rate = use.busy_ns() > 0 ? static_cast<double>(use.bytes()) / 1e9 / seconds : 0;
    absl::StrAppendFormat(&text, "  %-9s    %s in %.2f s (%.1f GB/s), idle %.2f s\n",
                          LaneText(use.lane()), FormatBytes(use.bytes()), seconds, rate,
                          static_cast<double>(use.idle_ns()) / 1e9);
  }
  const v1::InPlaceCounters& in_place = status.in_place();
  absl::StrAppendFormat(&text,
                        "kvstore: %d layers attended to in place, %d refused, %d too late; steps run "
                        "again: %d\n",
                        in_place.posts(), in_place.refused(), in_place.late_partials(),
                        status.retried_steps());
  absl::StrAppendFormat(&text, "libraries' plans: %d built at start, %d since\n",
                        status.plans_at_start(), status.plans_built() - status.plans_at_start());
  return text;
}

}  // namespace headroom::cli
