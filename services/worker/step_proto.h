// Steps and plans between the coordinator's messages and the executor's plain data.
#ifndef HEADROOM_SERVICES_WORKER_STEP_PROTO_H_
#define HEADROOM_SERVICES_WORKER_STEP_PROTO_H_

#include <memory>

#include "absl/status/statusor.h"
#include "common/lane_costs.h"
#include "headroom/v1/types.pb.h"
#include "headroom/v1/worker.pb.h"
#include "services/worker/step.h"

namespace headroom {

// INVALID_ARGUMENT names the field. Checked here is what the message alone can tell: numbers that do
// not fit, sampling out of range, extents that are not one for each layer in order. Whether a sequence
// is open or a run follows another is the executor's to say.
absl::StatusOr<std::unique_ptr<Step>> StepFromProto(const v1::StepRequest& request);

// INVALID_ARGUMENT names layer and range.
absl::StatusOr<Plan> PlanFromProto(const v1::Plan& plan);

// The answer to a step that has run, or failed (then with code and message only).
void StepToProto(const Step& step, v1::StepResponse* response);

void CostsToProto(const LaneCosts& costs, v1::MeasureLanesResponse* response);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_PROTO_H_
