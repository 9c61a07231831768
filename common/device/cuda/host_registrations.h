// Host memory that the GPU may address: pinned and mapped, in pieces. Thread-safe.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_HOST_REGISTRATIONS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_HOST_REGISTRATIONS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/mutex.h"

namespace headroom {

class HostRegistrations {
 public:
  ~HostRegistrations();

  // ALREADY_EXISTS if it meets another range; INVALID_ARGUMENT for an empty one; what the driver
  // says, with all taken back.
  absl::Status Add(uint8_t* data, int64_t bytes);
  // NOT_FOUND. REQUIRES: no operation uses the range any more.
  absl::Status Remove(const uint8_t* data);

  // Whether one piece holds all of the range.
  bool Contain(const void* data, int64_t bytes) const;

 private:
  struct Range {
    const uint8_t* data;
    int64_t bytes;
  };
  struct Piece {
    uint8_t* data;
    int64_t bytes;
    const uint8_t* range;  // what it is a piece of, by its beginning
  };

  void EraseRange(const uint8_t* data) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;  // not held while the driver pins: launches look here
  std::vector<Piece> pieces_ ABSL_GUARDED_BY(mutex_);
  std::vector<Range> ranges_ ABSL_GUARDED_BY(mutex_);  // also those being added
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_HOST_REGISTRATIONS_H_
