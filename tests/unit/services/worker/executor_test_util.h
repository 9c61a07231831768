// What the executor's tests share: how much of a test a sanitizer gets, versions of plans.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_

#include <cstdint>
#include <vector>

namespace headroom {

// Under a sanitizer everything takes some twenty times as long: the same paths, less of each.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kThoroughly = false;
#else
inline constexpr bool kThoroughly = true;
#endif

template <typename T>
std::vector<T> Either(std::vector<T> thoroughly, std::vector<T> briefly) {
  return kThoroughly ? thoroughly : briefly;
}
constexpr int Either(int thoroughly, int briefly) { return kThoroughly ? thoroughly : briefly; }

// Plans by what a test has prepared under their versions.
inline constexpr uint64_t kResident = 1;
inline constexpr uint64_t kFetched = 2;
inline constexpr uint64_t kMixed = 3;  // some heads in one lane, some in another
inline constexpr uint64_t kAllInPlace = 4;

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_
