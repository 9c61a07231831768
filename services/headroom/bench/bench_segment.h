// The bench's host memory for keys: a mapping whose pieces are backed, filled and registered one after
// the other in the background, so that 122 GiB cost a prefill no more than its first chunks' wait.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_SEGMENT_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_SEGMENT_H_

#include <cstdint>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "common/segment/mapped_region.h"

namespace headroom {

// Thread-safe.
class BenchSegment {
 public:
  // `device` outlives this; `threads` fill. RESOURCE_EXHAUSTED if the system has not got so much memory;
  // other errors are those of the mapping.
  static absl::StatusOr<std::unique_ptr<BenchSegment>> Create(Device& device, int64_t bytes,
                                                              int32_t threads);
  // REQUIRES: no operation uses the segment any more.
  ~BenchSegment();

  uint8_t* data() const { return region_.data(); }
  int64_t bytes() const { return region_.bytes(); }

  // Waits until bytes [0, end) hold keys (finite, random) and may be named by the device; from then on
  // they are only written by whoever seals, and between items by the ceilings' probe. Errors are those of the registration.
  absl::Status Await(int64_t end);

 private:
  BenchSegment(Device& device, MappedRegion region)
      : device_(device), region_(std::move(region)) {}
  void Prepare(int32_t threads);

  Device& device_;
  const MappedRegion region_;
  mutable Mutex mutex_;
  CondVar more_ready_;
  int64_t ready_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread background_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_SEGMENT_H_
