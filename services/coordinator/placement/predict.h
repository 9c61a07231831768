// What a placement will come to, before anything runs: `headroom plan`, and the check that shares
// fit.
#ifndef HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PREDICT_H_
#define HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PREDICT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "common/kv_layout.h"
#include "common/lane_costs.h"
#include "services/coordinator/lease.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

// A sequence that is to have `tokens`, `prompt_tokens` of them at once, with the runs that leasing
// will give it.
SequenceShape ForeseenShape(const ExtentRules& rules, int64_t prompt_tokens, int64_t tokens);

struct LanePrediction {
  double kv_heads = 0;  // mean per layer; a cut head counts by its share of the tokens
  int64_t bytes = 0;    // keys and values that one decode step reads in this lane
};

struct Prediction {
  Placement placement;
  LanePrediction lanes[kNumLanes];
  int64_t host_bytes = 0;      // extents of all sequences, at any time at most
  int64_t tail_bytes = 0;      // of the device, for all sequences
  int64_t resident_bytes = 0;  // of the device: whole extents
  int64_t pool_bytes = 0;      // what the device has for the two
  double step_seconds = 0;     // of a decode step after the prompt; 0: unknown
  // What will not fit, in words with the numbers and the flag to change; empty if all does.
  std::vector<std::string> does_not_fit;
};

struct PredictInput {
  ExtentRules extents;
  PlacementSpec spec;
  int64_t num_sequences = 1;
  int64_t prompt_tokens = 0;  // of each
  int64_t max_tokens = 0;
  int64_t pool_bytes = 0;
  int64_t tail_bytes_per_sequence = 0;
  int64_t host_capacity_bytes = 0;
  // Unknown: no time is predicted, and what is not resident is fetched.
  LaneCosts costs;
};

// REQUIRES: numbers are not negative, the geometry is valid and bytes stay within int64.
Prediction Predict(const PredictInput& input);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PREDICT_H_
