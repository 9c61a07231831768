// What decode steps cost on this machine, found by running some through the executor, the ring and the
// mailbox as they are: what the planner balances with.
#ifndef HEADROOM_SERVICES_WORKER_LANE_CALIBRATION_H_
#define HEADROOM_SERVICES_WORKER_LANE_CALIBRATION_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/lane_costs.h"
#include "services/worker/device_budget.h"
#include "services/worker/decode_probe.h"
#include "services/worker/model/model_config.h"
#include "services/worker/step.h"
#include "services/worker/step_executor.h"

namespace headroom {

struct CalibrationOptions {
  int64_t segment_bytes = 0;  // of the segment, from its begin on, may be read
  DeviceBudget budget;        // the executor's
  // What begins after a half of it takes fewer steps. Of further rounds nothing begins after a half, of lanes
  // side by side after three quarters.
  absl::Duration time_limit = absl::Seconds(4);
};

// The context of steps over many keys: so many that what a lane costs however few its keys are (a GPU's
// 0.1 ms a layer in place, short extents) does not count, within what the executor's tables hold.
int64_t CalibrationTokens(const KvGeometry& geometry, const DeviceBudget& budget);

// Runs steps on `executor`, which must have no sequence and nobody else's step; leaves it without one.
// In place costs are those of fetching where no store attends. Errors are the steps', and DEADLINE_EXCEEDED
// where the first round takes four times the time limit.
absl::StatusOr<LaneCosts> CalibrateLanes(StepExecutor& executor, const ModelConfig& config,
                                         const CalibrationOptions& options, const StepPort& port);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_LANE_CALIBRATION_H_
