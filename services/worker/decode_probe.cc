#include "services/worker/decode_probe.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::unique_ptr<Step> NewStep(const DecodeWork& work, const StepPort& port) {
  auto step = std::make_unique<Step>();
  step->number = port.next_number();
  step->plan_version = work.plan_version;
  return step;
}

absl::StatusOr<std::unique_ptr<Step>> Take(const StepPort& port) {
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Step> step, port.take());
  HEADROOM_RETURN_IF_ERROR(Annotate(step->result.status, absl::StrCat("step ", step->number)));
  return step;
}

absl::Status Open(const DecodeWork& work, const StepPort& port) {
  const int64_t sealed = FloorToBlock(work.context_tokens);
  for (const OpenSequence& open : work.sequences) {
    std::unique_ptr<Step> step = NewStep(work, port);
    step->open.push_back(open);
    step->open.back().sealed_tokens = sealed;
    if (work.context_tokens > sealed) {
      StepSequence sequence;
      sequence.sequence_id = open.sequence_id;
      sequence.first_pos = sequence.sealed_tokens = sealed;
      sequence.token_ids.assign(work.context_tokens - sealed, 1);
      step->sequences.push_back(std::move(sequence));
    }
    HEADROOM_RETURN_IF_ERROR(port.submit(std::move(step)));
    HEADROOM_RETURN_IF_ERROR(Take(port).status());
  }
  return absl::OkStatus();
}

}  // namespace

void StepTimes::Add(const StepResult& result, double weight) {
  for (int lane = 0; lane < kNumLanes; ++lane) {
    lane_bytes[lane] += weight * static_cast<double>(result.lanes[lane].bytes);
    lane_busy_seconds[lane] += weight * 1e-9 * static_cast<double>(result.lanes[lane].busy_ns);
    lane_idle_seconds[lane] += weight * 1e-9 * static_cast<double>(result.lanes[lane].idle_ns);
  }
  fetch_wait_seconds += weight * 1e-9 * static_cast<double>(result.fetch_wait_ns);
  in_place_wait_seconds += weight * 1e-9 * static_cast<double>(result.in_place_wait_ns);
  sealed_bytes += weight * static_cast<double>(result.sealed_bytes);
}

absl::StatusOr<DecodeTimes> MeasureDecode(const DecodeWork& work, const StepPort& port) {
  HEADROOM_RETURN_IF_ERROR(Open(work, port));
  const int steps = work.warm_steps + work.measured_steps;
  DecodeTimes times;
  double begin = 0, last = 0;
  std::vector<double> each;
  for (int submitted = 0, taken = 0; taken < steps;) {
    if (submitted < steps && submitted - taken < kStepsInFlight) {
      std::unique_ptr<Step> step = NewStep(work, port);
      for (const OpenSequence& open : work.sequences) {
        StepSequence sequence;
        sequence.sequence_id = open.sequence_id;
        sequence.first_pos = work.context_tokens + submitted;
        sequence.sealed_tokens = FloorToBlock(work.context_tokens);
        if (submitted == 0) sequence.token_ids.push_back(1);
        sequence.draw = true;
        step->sequences.push_back(std::move(sequence));
      }
      HEADROOM_RETURN_IF_ERROR(port.submit(std::move(step)));
      ++submitted;
      continue;
    }
    HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<Step> step, Take(port));
    ++taken;
    if (taken > work.warm_steps) {
      times.Add(step->result, 1.0 / work.measured_steps);
      each.push_back(Now() - last);
    }
    last = Now();
    if (taken == work.warm_steps) {
      begin = last;
      if (work.on_measured_begin) work.on_measured_begin();
    }
  }
  times.step_seconds = (last - begin) / work.measured_steps;
  std::nth_element(each.begin(), each.begin() + work.measured_steps / 2, each.end());
  times.median_step_seconds = each[work.measured_steps / 2];
  return times;
}

}  // namespace headroom
