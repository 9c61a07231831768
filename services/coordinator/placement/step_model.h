// How to share what is not resident between the two ways to it, by what a decode step will take: pure
// functions of numbers.
#ifndef HEADROOM_SERVICES_COORDINATOR_PLACEMENT_STEP_MODEL_H_
#define HEADROOM_SERVICES_COORDINATOR_PLACEMENT_STEP_MODEL_H_

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/lane_costs.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

// Bytes of keys and values of one step, by Lane.
using LaneBytes = LaneValues;
static_assert(std::tuple_size_v<LaneBytes> == kNumLanes);

// The share of `bytes` not resident that is fetched in the shortest step; the rest goes in place. Where
// copies hide under the base and both ways run side by side, this is the balance
//   f KV / B_fetch = (1 - f) KV / B_in_place + E,  E = hidden_base * base + in_place_seconds,
// with the rates that both have while both run; where they take turns, all goes the cheaper way. 1 where
// nothing is known. In place must win by 2%.
double BestFetchedShare(const LaneCosts& costs, double bytes);

// PlaceByBudget() with the share that suits what it leaves outside the device.
Placement PlaceByBudget(const KvGeometry& geometry, int64_t budget_bytes, const LaneCosts& costs,
                        const std::vector<SequenceShape>& sequences,
                        const LayerWindows& windows = {});
// Bytes of one decode step of all sequences under a placement.
LaneBytes BytesOfStep(const KvGeometry& geometry, const Placement& placement,
                      const std::vector<SequenceShape>& sequences, const LayerWindows& windows = {});

// Costs brought up to date from the steps that run.
class StepModel {
 public:
  // What was calibrated.
  void Reset(const LaneCosts& costs);
  const LaneCosts& costs() const { return costs_; }

  // A decode step has moved `bytes` in `busy_seconds`, by lane.
  void Observe(const LaneBytes& bytes, const LaneBytes& busy_seconds);
  // Whether another share would now make steps that have `bytes` in the lanes shorter by more than 10%.
  // Looked at once in 64 steps: a plan that has just been made is given time to show itself.
  bool WantsAnotherShare(const LaneBytes& bytes);

 private:
  // Weight of one step in the running means; steps until the next look.
  static constexpr double kWeight = 0.1;
  static constexpr int kPatience = 64;
  static constexpr double kWorthwhile = 0.9;
  // A measurement further off than this says more of the measurement.
  static constexpr double kMostCorrection = 8;

  LaneCosts calibrated_;
  LaneCosts costs_;
  std::array<double, kNumLanes> corrections_ = {1, 1, 1};
  int steps_since_ = 0;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_PLACEMENT_STEP_MODEL_H_
