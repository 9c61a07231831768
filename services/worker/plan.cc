#include "services/worker/plan.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace headroom {

absl::Status ValidatePlan(const Plan& plan, int32_t num_layers, int32_t num_kv_heads) {
  const auto wrong = [&](int layer, absl::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat("plan ", plan.version, ", layer ", layer, ": ", what));
  };
  if (static_cast<int32_t>(plan.layers.size()) != num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("plan ", plan.version, " has ",
                                                   plan.layers.size(), " layers, the model ",
                                                   num_layers));
  }
  constexpr int64_t kNoEnd = std::numeric_limits<int64_t>::max();
  for (int layer = 0; layer < num_layers; ++layer) {
    const std::vector<LaneRange>& ranges = plan.layers[layer];
    for (const LaneRange& range : ranges) {
      if (range.kv_head_begin < 0 || range.kv_head_end > num_kv_heads ||
          range.kv_head_begin >= range.kv_head_end || range.first_pos < 0 ||
          range.first_pos >= range.end_pos) {
        return wrong(layer, absl::StrCat("a range of KV heads [", range.kv_head_begin, ", ",
                                         range.kv_head_end, ") and positions [", range.first_pos,
                                         ", ", range.end_pos, ")"));
      }
    }
    for (int32_t head = 0; head < num_kv_heads; ++head) {
      std::vector<LaneRange> of_head;
      std::copy_if(ranges.begin(), ranges.end(), std::back_inserter(of_head), [head](const LaneRange& range) {
        return head >= range.kv_head_begin && head < range.kv_head_end;
      });
      std::sort(of_head.begin(), of_head.end(),
                [](const LaneRange& a, const LaneRange& b) { return a.first_pos < b.first_pos; });
      int64_t next = 0;  // position
      for (const LaneRange& range : of_head) {
        if (range.first_pos > next) break;
        if (range.first_pos < next) {
          return wrong(layer, absl::StrCat("KV head ", head, " has ranges that overlap at position ",
                                           range.first_pos));
        }
        next = range.end_pos;
      }
      if (next != kNoEnd) {
        return wrong(layer, absl::StrCat("KV head ", head, " has no lane from position ", next));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace headroom
