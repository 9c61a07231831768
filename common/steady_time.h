// Time that only goes forward, from an arbitrary start, the same for all processes of a machine.
#ifndef HEADROOM_COMMON_STEADY_TIME_H_
#define HEADROOM_COMMON_STEADY_TIME_H_

#include <chrono>
#include <cstdint>

namespace headroom {

inline int64_t SteadyNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline double SteadySeconds() { return 1e-9 * static_cast<double>(SteadyNs()); }

}  // namespace headroom

#endif  // HEADROOM_COMMON_STEADY_TIME_H_
