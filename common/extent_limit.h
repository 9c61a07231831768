// How long extents are at most: the coordinator asks for no longer ones, and the worker has room in a step's
// tables for as many as a context then has.
#ifndef HEADROOM_COMMON_EXTENT_LIMIT_H_
#define HEADROOM_COMMON_EXTENT_LIMIT_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/kv_layout.h"

namespace headroom {

// `windows`: per layer the tokens that a query sees; 0: all. Not longer than the shortest window, or an extent
// of which a part lies behind it would be kept for long; but a unit at least, so that descriptors stay few.
inline int64_t MaxExtentTokens(const KvGeometry& geometry, const std::vector<int64_t>& windows) {
  int64_t shortest = std::numeric_limits<int64_t>::max();
  for (const int64_t window : windows) {
    if (window > 0) shortest = std::min(shortest, std::max(window, kUnitTokens));
  }
  int64_t tokens = geometry.MaxExtentTokens();
  while (tokens > kBlockTokens && tokens > shortest) tokens /= 2;
  return tokens;
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_EXTENT_LIMIT_H_
