#include "services/coordinator/plan_proto.h"

namespace headroom::coordinator {

v1::Lane ToProto(Lane lane) {
  switch (lane) {
    case Lane::kResident:
      return v1::LANE_RESIDENT;
    case Lane::kFetched:
      return v1::LANE_FETCHED;
    case Lane::kInPlace:
      return v1::LANE_IN_PLACE;
  }
  return v1::LANE_UNSPECIFIED;
}

v1::Plan ToProto(const Placement& placement, uint64_t version) {
  v1::Plan plan;
  plan.set_version(version);
  for (const std::vector<LaneRange>& ranges : placement.layers) {
    v1::LayerPlan* const layer = plan.add_layers();
    for (const LaneRange& range : ranges) {
      v1::LaneRange* const out = layer->add_ranges();
      out->set_lane(ToProto(range.lane));
      out->set_kv_head_begin(range.kv_head_begin);
      out->set_kv_head_end(range.kv_head_end);
      out->set_first_pos(range.first_pos);
      if (range.end_pos != kNoEnd) out->set_end_pos(range.end_pos);
    }
  }
  return plan;
}

KvGeometry FromProto(const v1::KvGeometry& geometry) {
  return {geometry.num_layers(), geometry.num_kv_heads(), geometry.head_dim()};
}

v1::KvGeometry ToProto(const KvGeometry& geometry) {
  v1::KvGeometry out;
  out.set_num_layers(geometry.num_layers);
  out.set_num_kv_heads(geometry.num_kv_heads);
  out.set_head_dim(geometry.head_dim);
  return out;
}

RunShape ShapeOf(const v1::ExtentRun& run) { return {run.first_pos(), run.capacity_tokens()}; }

}  // namespace headroom::coordinator
