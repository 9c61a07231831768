#include "services/coordinator/plan_proto.h"

#include <cmath>

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

LaneCosts FromProto(const v1::MeasureLanesResponse& from) {
  const auto sane = [](double value) { return std::isfinite(value) && value >= 0; };
  LaneCosts costs;
  costs.base_seconds = from.base_seconds();
  costs.resident_base_seconds = from.resident_base_seconds();
  costs.hidden_base = from.hidden_base();
  costs.in_place_seconds = from.in_place_seconds();
  // Of lanes that end together, an older worker's overlap is this of both.
  const double of_overlap = 2 - from.overlap();
  costs.fetched_slowdown = from.has_fetched_slowdown() ? from.fetched_slowdown() : of_overlap;
  costs.in_place_slowdown = from.has_in_place_slowdown() ? from.in_place_slowdown() : of_overlap;
  bool all_sane = sane(costs.base_seconds) && sane(costs.resident_base_seconds) &&
                  sane(costs.hidden_base) && costs.hidden_base <= 1 &&
                  sane(costs.in_place_seconds) && sane(costs.fetched_slowdown) &&
                  costs.fetched_slowdown >= 1 && sane(costs.in_place_slowdown) &&
                  costs.in_place_slowdown >= 1;
  for (const v1::LaneCost& lane : from.lanes()) {
    const int index = static_cast<int>(lane.lane()) - 1;
    if (index < 0 || index >= kNumLanes) continue;
    costs.seconds_per_byte[index] = lane.seconds_per_byte();
    costs.busy_seconds_per_byte[index] = lane.busy_seconds_per_byte();
    all_sane = all_sane && sane(lane.seconds_per_byte()) && sane(lane.busy_seconds_per_byte());
  }
  return all_sane ? costs : LaneCosts();
}

}  // namespace headroom::coordinator
