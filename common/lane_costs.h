// What decode steps cost on a machine: measured by a worker, used by whoever plans. Plain numbers.
#ifndef HEADROOM_COMMON_LANE_COSTS_H_
#define HEADROOM_COMMON_LANE_COSTS_H_

namespace headroom {

// Of steps of one row. Such a step takes
//   base + resident + overlap max(fetched, in place) + (1 - overlap) (fetched + in place)
// seconds, each lane its bytes times seconds_per_byte, and fetched less hidden_base * base, at least 0.
// Arrays are indexed by lane: resident, fetched, in place.
struct LaneCosts {
  double base_seconds = 0;  // a step over next to no keys; 0: nothing is known
  double seconds_per_byte[3] = {};
  // Of the lane's busy time: what later measurements are compared with.
  double busy_seconds_per_byte[3] = {};
  double hidden_base = 0;  // the share of the base under which copies go unnoticed: 0 to 1
  double overlap = 0;      // how far fetched and in place run side by side: 0 to 1

  bool known() const { return base_seconds > 0; }
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_LANE_COSTS_H_
