// How a lane is spelt.
#ifndef HEADROOM_SERVICES_HEADROOM_LANE_TEXT_H_
#define HEADROOM_SERVICES_HEADROOM_LANE_TEXT_H_

#include <string>

#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "headroom/v1/types.pb.h"
#include "services/coordinator/plan_proto.h"

namespace headroom::cli {

inline constexpr v1::Lane kLanes[] = {v1::LANE_RESIDENT, v1::LANE_FETCHED, v1::LANE_IN_PLACE};

// For people, and in flags.
inline const char* LaneText(v1::Lane lane) {
  for (int i = 0; i < coordinator::kNumLanes; ++i) {
    const auto candidate = static_cast<coordinator::Lane>(i);
    if (coordinator::ToProto(candidate) == lane) return coordinator::LaneName(candidate);
  }
  return "unknown";
}

// The same as a key of JSON, where words are joined as in all other keys.
inline std::string LaneKey(absl::string_view text) { return absl::StrReplaceAll(text, {{"-", "_"}}); }

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_LANE_TEXT_H_
