// What programs that cannot go on without a GPU do with an error: say it and end.
#ifndef HEADROOM_TESTS_GPU_REQUIRE_H_
#define HEADROOM_TESTS_GPU_REQUIRE_H_

#include <cstdio>
#include <cstdlib>

#include "absl/status/status.h"

namespace headroom {

inline void Require(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

}  // namespace headroom

#endif  // HEADROOM_TESTS_GPU_REQUIRE_H_
