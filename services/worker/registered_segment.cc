#include "services/worker/registered_segment.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/log.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom {
namespace {

// How often the store is looked at while it has not got all its memory.
constexpr absl::Duration kReadyInterval = absl::Milliseconds(50);

}  // namespace

absl::StatusOr<std::unique_ptr<RegisteredSegment>> RegisteredSegment::Create(
    Device& device, std::unique_ptr<MappedSegment> segment) {
  std::unique_ptr<RegisteredSegment> registered(
      new RegisteredSegment(device, std::move(segment)));
  {
    MutexLock lock(&registered->mutex_);
    HEADROOM_RETURN_IF_ERROR(registered->RegisterNext().status());
  }
  registered->background_ = std::thread([raw = registered.get()] { raw->BackgroundLoop(); });
  return registered;
}

RegisteredSegment::~RegisteredSegment() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    stop_condition_.SignalAll();
  }
  if (background_.joinable()) background_.join();
  MutexLock lock(&mutex_);
  for (int64_t begin = 0; begin < registered_bytes_; begin += kRegistrationBytes) {
    device_.UnregisterHost(segment_->data() + begin).IgnoreError();
  }
}

absl::StatusOr<bool> RegisteredSegment::RegisterNext() {
  const int64_t bytes = std::min(kRegistrationBytes, segment_->data_bytes() - registered_bytes_);
  if (bytes <= 0 || segment_->ready_bytes() < registered_bytes_ + bytes) return false;
  HEADROOM_RETURN_IF_ERROR(device_.RegisterHost(segment_->data() + registered_bytes_, bytes));
  registered_bytes_ += bytes;
  return true;
}

absl::Status RegisteredSegment::Require(int64_t end) {
  if (registered_bytes_ >= end) return absl::OkStatus();
  MutexLock lock(&mutex_);
  while (registered_bytes_ < end) {
    HEADROOM_ASSIGN_OR_RETURN(const bool more, RegisterNext());
    if (more) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        "an extent ends at byte ", end, " of the segment; the store has memory for ",
        segment_->ready_bytes(), " of ", segment_->data_bytes(), " bytes, in whole pieces ",
        registered_bytes()));
  }
  return absl::OkStatus();
}

void RegisteredSegment::BackgroundLoop() {
  MutexLock lock(&mutex_);
  while (!stop_ && registered_bytes_ < segment_->data_bytes()) {
    const absl::StatusOr<bool> more = RegisterNext();
    if (!more.ok()) {
      LogError(absl::StrCat("registering the segment's bytes from ", registered_bytes(), " on: ",
                            more.status().message()));
      return;
    }
    // Between two pieces Require() gets its turn.
    stop_condition_.WaitFor(&mutex_, *more ? absl::Microseconds(100) : kReadyInterval);
  }
  if (registered_bytes_ < segment_->data_bytes()) return;
  LogInfo(absl::StrFormat(
      "all %d MiB of the segment are registered with the device, after %s", segment_->data_bytes() >> 20,
      absl::FormatDuration(absl::Trunc(absl::Now() - begun_, absl::Milliseconds(1)))));
}

}  // namespace headroom
