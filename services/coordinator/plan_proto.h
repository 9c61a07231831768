// Placements to and from the messages that travel.
#ifndef HEADROOM_SERVICES_COORDINATOR_PLAN_PROTO_H_
#define HEADROOM_SERVICES_COORDINATOR_PLAN_PROTO_H_

#include <cstdint>

#include "common/kv_layout.h"
#include "common/lane_costs.h"
#include "headroom/v1/types.pb.h"
#include "headroom/v1/worker.pb.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

v1::Plan ToProto(const Placement& placement, uint64_t version);
v1::Lane ToProto(Lane lane);
KvGeometry FromProto(const v1::KvGeometry& geometry);
v1::KvGeometry ToProto(const KvGeometry& geometry);
// Unknown if the message contradicts itself.
LaneCosts FromProto(const v1::MeasureLanesResponse& costs);
RunShape ShapeOf(const v1::ExtentRun& run);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_PLAN_PROTO_H_
