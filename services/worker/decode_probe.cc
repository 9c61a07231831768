#include "services/worker/decode_probe.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "common/steady_time.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

std::unique_ptr<Step> NewStep(const DecodeWork& work, const StepPort& port) {
  auto step = std::make_unique<Step>();
  step->number = port.next_number();
  step->plan_version = work.plan_version;
  return step;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Step>> TakeStep(const StepPort& port) {
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Step> step, port.take());
  HEADROOM_RETURN_IF_ERROR(Annotate(step->result.status, absl::StrCat("step ", step->number)));
  return step;
}

absl::Status DecodeSteps::Open() {
  const int64_t sealed = FloorToBlock(work_.context_tokens);
  for (const OpenSequence& open : work_.sequences) {
    std::unique_ptr<Step> step = NewStep(work_, port_);
    step->open.push_back(open);
    step->open.back().sealed_tokens = sealed;
    if (work_.context_tokens > sealed) {
      StepSequence sequence;
      sequence.sequence_id = open.sequence_id;
      sequence.first_pos = sequence.sealed_tokens = sealed;
      sequence.token_ids.assign(work_.context_tokens - sealed, 1);
      step->sequences.push_back(std::move(sequence));
    }
    HEADROOM_RETURN_IF_ERROR(port_.submit(std::move(step)));
    HEADROOM_RETURN_IF_ERROR(TakeStep(port_).status());
  }
  return absl::OkStatus();
}

absl::Status DecodeSteps::SubmitNext() {
  std::unique_ptr<Step> step = NewStep(work_, port_);
  for (const OpenSequence& open : work_.sequences) {
    StepSequence sequence;
    sequence.sequence_id = open.sequence_id;
    sequence.first_pos = work_.context_tokens + submitted_;
    // A block less than is whole, as the coordinator: what was sealed last may still be on its way.
    sequence.sealed_tokens = std::max(FloorToBlock(work_.context_tokens),
                                      FloorToBlock(sequence.first_pos) - kBlockTokens);
    if (submitted_ == 0) sequence.token_ids.push_back(1);
    sequence.draw = true;
    step->sequences.push_back(std::move(sequence));
  }
  ++submitted_;
  return port_.submit(std::move(step));
}

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

void StepTimes::Scale(double factor) {
  for (int lane = 0; lane < kNumLanes; ++lane) {
    lane_bytes[lane] *= factor;
    lane_busy_seconds[lane] *= factor;
    lane_idle_seconds[lane] *= factor;
  }
  fetch_wait_seconds *= factor;
  in_place_wait_seconds *= factor;
  sealed_bytes *= factor;
}

absl::StatusOr<DecodeTimes> MeasureDecode(const DecodeWork& work, const StepPort& port) {
  DecodeSteps decode(work, port);
  HEADROOM_RETURN_IF_ERROR(decode.Open());
  const int steps = work.warm_steps + work.measured_steps;
  DecodeTimes times;
  double begin = 0, last = 0;
  std::vector<double> each;
  for (int taken = 0; taken < steps;) {
    if (decode.submitted() < steps && decode.submitted() - taken < kStepsInFlight) {
      HEADROOM_RETURN_IF_ERROR(decode.SubmitNext());
      continue;
    }
    HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<Step> step, TakeStep(port));
    ++taken;
    if (taken > work.warm_steps) {
      times.Add(step->result, 1.0 / work.measured_steps);
      each.push_back(SteadySeconds() - last);
    }
    last = SteadySeconds();
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
