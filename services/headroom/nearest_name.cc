#include "services/headroom/nearest_name.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/match.h"

namespace headroom::cli {
namespace {

// Optimal string alignment distance, row by row. Names are short; what is typed is cut.
int64_t Distance(absl::string_view a, absl::string_view b) {
  std::vector<int64_t> before(b.size() + 1), row(b.size() + 1), next(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int64_t>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    next[0] = static_cast<int64_t>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int64_t changed = row[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      next[j] = std::min({row[j] + 1, next[j - 1] + 1, changed});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        next[j] = std::min(next[j], before[j - 2] + 1);
      }
    }
    before.swap(row);
    row.swap(next);
  }
  return row[b.size()];
}

}  // namespace

std::string NearestName(absl::string_view name, const std::vector<std::string>& candidates) {
  constexpr size_t kLongest = 64;
  name = name.substr(0, kLongest);
  std::string nearest;
  int64_t least = -1;
  for (const std::string& candidate : candidates) {
    int64_t distance = Distance(name, candidate);
    if (!name.empty() && absl::StartsWith(candidate, name)) {
      distance = std::min<int64_t>(distance, 1);
    }
    if (least < 0 || distance < least) {
      least = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

}  // namespace headroom::cli
