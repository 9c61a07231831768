// What somebody who mistyped a name may have meant.
#ifndef HEADROOM_SERVICES_HEADROOM_NEAREST_NAME_H_
#define HEADROOM_SERVICES_HEADROOM_NEAREST_NAME_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace headroom::cli {

// The candidate with the fewest letters changed, left out, added or swapped with a neighbour (each
// counts one; a candidate that begins with `name` counts one at most); the first of equals. Empty
// without candidates.
std::string NearestName(absl::string_view name, const std::vector<std::string>& candidates);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_NEAREST_NAME_H_
