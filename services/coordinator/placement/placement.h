// Which keys are attended where: pure functions of numbers.
//
// A placement is rules per layer, the same for every sequence: rectangles of KV heads and
// positions, each in one lane. An extent belongs to the rectangle that contains its first position,
// so a head can be cut at extent borders only.
//
// Resident heads come first, then fetched, then those attended in place. In a head that is cut, the
// newest extents are resident and the oldest in place: the oldest positions leave the device first.
#ifndef HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PLACEMENT_H_
#define HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PLACEMENT_H_

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/kv_layout.h"

namespace headroom::coordinator {

enum class Lane : uint8_t { kResident, kFetched, kInPlace };
inline constexpr int kNumLanes = 3;
// "resident", "fetched", "in-place".
const char* LaneName(Lane lane);

inline constexpr int64_t kNoEnd = std::numeric_limits<int64_t>::max();

// KV heads [kv_head_begin, kv_head_end), positions [first_pos, end_pos).
struct LaneRange {
  Lane lane = Lane::kFetched;
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  int64_t first_pos = 0;
  int64_t end_pos = kNoEnd;

  friend bool operator==(const LaneRange&, const LaneRange&) = default;
};

struct Placement {
  // Per layer: ranges that cover every KV head and position exactly once.
  std::vector<std::vector<LaneRange>> layers;

  // REQUIRES: layer and kv_head are within the geometry.
  Lane LaneOf(int32_t layer, int32_t kv_head, int64_t extent_first_pos) const;
  friend bool operator==(const Placement&, const Placement&) = default;
};

// What a request asks for.
struct PlacementSpec {
  bool automatic = true;
  // Shares of the KV heads of each layer by Lane; they sum to 1. Only where not automatic.
  std::array<double, kNumLanes> shares = {};

  double share(Lane lane) const { return shares[static_cast<int>(lane)]; }
  friend bool operator==(const PlacementSpec&, const PlacementSpec&) = default;
};

// Shares must be in [0, 1] and sum to 1 within 1e-6. INVALID_ARGUMENT says what is wrong.
absl::Status CheckShares(const std::array<double, kNumLanes>& shares);
// "auto", a lane's name, or "LANE=SHARE,...". INVALID_ARGUMENT.
absl::StatusOr<PlacementSpec> ParsePlacement(absl::string_view text);

// Positions [first_pos, first_pos + capacity_tokens) of a sequence have extents in all layers.
struct RunShape {
  int64_t first_pos = 0;
  int64_t capacity_tokens = 0;
};

// A sequence as the planner sees it: its runs, those foreseen included, and the tokens that shares
// refer to.
struct SequenceShape {
  std::vector<RunShape> runs;
  int64_t tokens = 0;
};

// Per layer the tokens that a query sees, its own among them; 0, or no entry: all up to it. What lies
// behind a layer's window is not read, and its resident copies are dropped: no function below counts it.
using LayerWindows = std::vector<int64_t>;
inline int64_t WindowOf(const LayerWindows& windows, int32_t layer) {
  return layer < static_cast<int32_t>(windows.size()) ? windows[layer] : 0;
}
// The first position, a block's, that is read in such a layer when `tokens` are there.
int64_t FirstKey(const LayerWindows& windows, int32_t layer, int64_t tokens);

// As the shares say. A share that is no whole number of heads cuts a head at the extent border of
// the longest sequence that is nearest to the share of its tokens.
Placement PlaceByShares(const KvGeometry& geometry, const PlacementSpec& spec,
                        const std::vector<SequenceShape>& sequences);

// As much resident as fits `budget_bytes` of device memory, spread evenly over the layers (they
// differ by one extent border at most); layers with a window, whose keys grow no more, come before those
// without. Of the rest, `fetched_share` is fetched, and what is left is
// attended to in place: whole heads, and one that is cut at an extent border of the longest sequence.
Placement PlaceByBudget(const KvGeometry& geometry, int64_t budget_bytes, double fetched_share,
                        const std::vector<SequenceShape>& sequences,
                        const LayerWindows& windows = {});

// Device memory that the resident copies of all sequences take: whole extents.
int64_t ResidentBytes(const KvGeometry& geometry, const Placement& placement,
                      const std::vector<SequenceShape>& sequences, const LayerWindows& windows = {});

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_PLACEMENT_PLACEMENT_H_
