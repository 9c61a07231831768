#include "common/lane_costs.h"

#include <algorithm>
#include <cstddef>

namespace headroom {
namespace {

constexpr size_t kResidentLane = 0, kFetchedLane = 1, kInPlaceLane = 2;

// Seconds of a step's two lanes outside the device, as each is by itself.
struct Beside {
  Beside(const LaneCosts& costs, const LaneValues& bytes)
      : begin(bytes[kInPlaceLane] > 0 ? costs.in_place_seconds : 0),
        fetched(std::max(0.0, bytes[kFetchedLane] * costs.seconds_per_byte[kFetchedLane] -
                                  costs.hidden_base * costs.base_seconds - begin)),
        in_place(bytes[kInPlaceLane] * costs.seconds_per_byte[kInPlaceLane]) {
    // Until the first of them ends both are slower, then the other goes on alone.
    both = std::min(fetched * costs.fetched_slowdown, in_place * costs.in_place_slowdown);
    more_fetched = both * (1 - 1 / costs.fetched_slowdown);
    more_in_place = both * (1 - 1 / costs.in_place_slowdown);
  }
  double seconds() const {
    return begin + std::max(fetched + more_fetched, in_place + more_in_place);
  }

  double begin;  // of the pool, in which no bytes come
  double fetched, in_place;
  double both;
  double more_fetched, more_in_place;  // that they take because of each other
};

}  // namespace

LaneCosts Slower(LaneCosts costs, double factor) {
  costs.base_seconds *= factor;
  costs.resident_base_seconds *= factor;
  costs.in_place_seconds *= factor;
  for (double& seconds : costs.seconds_per_byte) seconds *= factor;
  for (double& seconds : costs.busy_seconds_per_byte) seconds *= factor;
  return costs;
}

double StepSeconds(const LaneCosts& costs, const LaneValues& bytes) {
  const bool all_resident = bytes[kFetchedLane] <= 0 && bytes[kInPlaceLane] <= 0;
  const double base = all_resident && costs.resident_base_seconds > 0 ? costs.resident_base_seconds
                                                                      : costs.base_seconds;
  return base + bytes[kResidentLane] * costs.seconds_per_byte[kResidentLane] +
         Beside(costs, bytes).seconds();
}

LaneValues BusySeconds(const LaneCosts& costs, const LaneValues& bytes) {
  const Beside beside(costs, bytes);
  LaneValues busy;
  for (size_t lane = 0; lane < busy.size(); ++lane) {
    busy[lane] = bytes[lane] * costs.busy_seconds_per_byte[lane];
  }
  busy[kFetchedLane] += beside.more_fetched;
  busy[kInPlaceLane] += beside.begin + beside.more_in_place;
  return busy;
}

}  // namespace headroom
