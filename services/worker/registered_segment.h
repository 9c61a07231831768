// A mapped segment whose bytes the device may name: registered in pieces of kRegistrationBytes, which no
// extent crosses (a copy across two registrations fails), as the store has them backed by memory.
// Registering a gigabyte takes a GPU's driver some 0.3 s, so what is not needed yet is done in the
// background; one thread, because more are no faster.
#ifndef HEADROOM_SERVICES_WORKER_REGISTERED_SEGMENT_H_
#define HEADROOM_SERVICES_WORKER_REGISTERED_SEGMENT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "common/segment/mapped_segment.h"

namespace headroom {

// Thread-safe.
class RegisteredSegment {
 public:
  // Registers the first piece; the rest follows in the background. `device` outlives this.
  static absl::StatusOr<std::unique_ptr<RegisteredSegment>> Create(
      Device& device, std::unique_ptr<MappedSegment> segment);
  // REQUIRES: no operation uses the segment any more.
  ~RegisteredSegment();

  const MappedSegment& segment() const { return *segment_; }
  int64_t registered_bytes() const { return registered_bytes_; }

  // Makes sure that bytes [0, end) may be named, ahead of the background if need be. Returns at once if
  // they may be: every step asks, and must not wait until the background has registered its next piece.
  // FAILED_PRECONDITION: the store has not got memory for them yet, or never had.
  absl::Status Require(int64_t end);

 private:
  RegisteredSegment(Device& device, std::unique_ptr<MappedSegment> segment)
      : device_(device), segment_(std::move(segment)), begun_(absl::Now()) {}
  // Registers the next piece if it is ready; false if it is not, or none is left.
  absl::StatusOr<bool> RegisterNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void BackgroundLoop();

  Device& device_;
  const std::unique_ptr<MappedSegment> segment_;
  const absl::Time begun_;
  Mutex mutex_;  // held while a piece is registered
  CondVar stop_condition_;
  std::atomic<int64_t> registered_bytes_{0};  // grows under mutex_
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread background_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_REGISTERED_SEGMENT_H_
