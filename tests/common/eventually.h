#ifndef HEADROOM_TESTS_COMMON_EVENTUALLY_H_
#define HEADROOM_TESTS_COMMON_EVENTUALLY_H_

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace headroom {

// Whether the condition holds before it has taken longer than any test may.
template <typename Condition>
bool Eventually(Condition condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_EVENTUALLY_H_
