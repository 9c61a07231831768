// What the tests of the KV store share.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KVSTORE_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KVSTORE_TEST_UTIL_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>

#include "common/segment_format.h"
#include "services/kvstore/segment.h"

namespace headroom::kvstore {

// A folder on the tmpfs that segments are made for; gone at the end.
class TempSegmentDir {
 public:
  TempSegmentDir() {
    std::string name = "/dev/shm/headroom-test-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TempSegmentDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Drawn anew each run, or HEADROOM_TEST_SEED; printed, so that a failure can be repeated.
inline uint64_t TestSeed() {
  const char* const text = getenv("HEADROOM_TEST_SEED");
  const uint64_t seed = text != nullptr ? strtoull(text, nullptr, 10) : std::random_device()();
  std::printf("HEADROOM_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// 2 layers x 2 KV heads x 64: a unit of 32 KiB; three heads make a unit that is no power of two.
inline constexpr KvGeometry kSmallGeometry = {2, 2, 64};
inline constexpr KvGeometry kThreeHeads = {3, 3, 64};

inline SegmentBinding BindingOf(const KvGeometry& geometry, uint8_t fingerprint) {
  SegmentBinding binding;
  binding.geometry = geometry;
  binding.fingerprint.fill(fingerprint);
  return binding;
}

inline SegmentOptions SmallSegment(const TempSegmentDir& dir, int64_t data_bytes = 8 << 20,
                                   int64_t max_extents = 256) {
  SegmentOptions options;
  options.dir = dir.path();
  options.data_bytes = data_bytes;
  options.max_extents = max_extents;
  return options;
}

// The value of a StatusOr that must be OK.
template <typename T>
T Must(absl::StatusOr<T> value) {
  EXPECT_TRUE(value.ok()) << value.status();
  if (!value.ok()) std::abort();
  return *std::move(value);
}

}  // namespace headroom::kvstore

#endif  // HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KVSTORE_TEST_UTIL_H_
