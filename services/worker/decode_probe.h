// Decode steps over keys that lie in the segment already, whatever they are: measured, sealing nothing.
// What `headroom bench` and the worker's calibration run.
#ifndef HEADROOM_SERVICES_WORKER_DECODE_PROBE_H_
#define HEADROOM_SERVICES_WORKER_DECODE_PROBE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/worker/step.h"

namespace headroom {

// Sums, or weighted means, of what steps report.
struct StepTimes {
  double lane_bytes[kNumLanes] = {};
  double lane_busy_seconds[kNumLanes] = {};
  double lane_idle_seconds[kNumLanes] = {};
  double fetch_wait_seconds = 0;     // the compute stream waited for tiles
  double in_place_wait_seconds = 0;  // ... and for keys in place
  double sealed_bytes = 0;

  void Add(const StepResult& result, double weight);
  void Scale(double factor);
};

// Means over the measured steps.
struct DecodeTimes : StepTimes {
  double step_seconds = 0;
  double median_step_seconds = 0;  // of the same: what one slow step does not move
};

struct DecodeWork {
  uint64_t plan_version = 0;
  // Each with runs for all positions of the measurement. Their ids must be free.
  std::vector<OpenSequence> sequences;
  int64_t context_tokens = 0;  // of each, in front of the first measured step
  int warm_steps = 0;          // at least 1
  int measured_steps = 0;      // at least 1
  std::function<void()> on_measured_begin;  // after the warm steps; may be empty
};

// Submits steps and takes those that have run, in order.
struct StepPort {
  std::function<absl::Status(std::unique_ptr<Step>)> submit;
  std::function<absl::StatusOr<std::unique_ptr<Step>>()> take;
  std::function<uint64_t()> next_number;
};

// Decode steps of `work`'s sequences, one after the other: each token but the first is the one drawn
// before. `work` and `port` outlive it.
class DecodeSteps {
 public:
  DecodeSteps(const DecodeWork& work, const StepPort& port) : work_(work), port_(port) {}

  // Opens the sequences with whole blocks sealed and prefills what is over. REQUIRES: nothing in flight.
  absl::Status Open();
  // REQUIRES: at most kStepsInFlight of them in flight.
  absl::Status SubmitNext();
  int64_t submitted() const { return submitted_; }

 private:
  const DecodeWork& work_;
  const StepPort& port_;
  int64_t submitted_ = 0;
};

// Opens the sequences, then decodes two steps deep, as the coordinator does. They stay open.
absl::StatusOr<DecodeTimes> MeasureDecode(const DecodeWork& work, const StepPort& port);

// The next step that has run; its error, if it has one.
absl::StatusOr<std::unique_ptr<Step>> TakeStep(const StepPort& port);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_DECODE_PROBE_H_
