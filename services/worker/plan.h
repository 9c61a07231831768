// Which lane attends to what, as the worker has it: made by the coordinator, which knows why.
#ifndef HEADROOM_SERVICES_WORKER_PLAN_H_
#define HEADROOM_SERVICES_WORKER_PLAN_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"

namespace headroom {

enum class Lane : uint8_t { kResident, kFetched, kInPlace };
inline constexpr int kNumLanes = 3;

// A rectangle of KV heads and positions of one layer that is attended in one lane.
struct LaneRange {
  Lane lane = Lane::kFetched;
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  int64_t first_pos = 0;
  int64_t end_pos = std::numeric_limits<int64_t>::max();
};

// A versioned placement: per layer, ranges that cover every head and position once.
struct Plan {
  uint64_t version = 0;
  std::vector<std::vector<LaneRange>> layers;

  // The lane of the extent of `kv_head` in `layer` that begins at `pos`.
  Lane LaneOf(int32_t layer, int32_t kv_head, int64_t pos) const {
    for (const LaneRange& range : layers[layer]) {
      if (kv_head >= range.kv_head_begin && kv_head < range.kv_head_end &&
          pos >= range.first_pos && pos < range.end_pos) {
        return range.lane;
      }
    }
    return Lane::kFetched;
  }
};

// InvalidArgument, with what is wrong where, unless `plan` gives every position of all `num_kv_heads` of all
// `num_layers` one lane.
absl::Status ValidatePlan(const Plan& plan, int32_t num_layers, int32_t num_kv_heads);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_PLAN_H_
