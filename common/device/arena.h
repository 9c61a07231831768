// Bookkeeping of one range of device memory, carved once at start. Not thread-safe.
#ifndef HEADROOM_COMMON_DEVICE_ARENA_H_
#define HEADROOM_COMMON_DEVICE_ARENA_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/checked_math.h"

namespace headroom {

class Arena {
 public:
  static constexpr int64_t kAlignBytes = 256;

  Arena(uint8_t* base, int64_t bytes) : base_(base), bytes_(bytes) {}

  // RESOURCE_EXHAUSTED names `what`, the bytes asked for and the bytes left.
  absl::StatusOr<uint8_t*> Allocate(int64_t bytes, absl::string_view what) {
    if (bytes < 0 || !RangeFits(used_, bytes, bytes_)) {
      return absl::ResourceExhaustedError(absl::StrCat("device memory for ", what, ": ", bytes,
                                                       " bytes asked for, ", bytes_ - used_,
                                                       " of ", bytes_, " left"));
    }
    uint8_t* const data = base_ + used_;
    const int64_t next = used_ + (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    used_ = next < bytes_ ? next : bytes_;
    return data;
  }

  bool Contains(const void* data, int64_t bytes) const {
    return RangeFits(static_cast<const uint8_t*>(data) - base_, bytes, bytes_);
  }
  uint8_t* base() const { return base_; }
  int64_t capacity_bytes() const { return bytes_; }
  int64_t used_bytes() const { return used_; }

 private:
  uint8_t* base_;
  int64_t bytes_;
  int64_t used_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_ARENA_H_
