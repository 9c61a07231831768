// The tables that kernels read during one step: built on the host in a staging buffer, uploaded to
// the arena by one copy before the step's first kernel.
#ifndef HEADROOM_SERVICES_WORKER_STEP_TABLES_H_
#define HEADROOM_SERVICES_WORKER_STEP_TABLES_H_

#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/device/device.h"
#include "kernels/types.h"

namespace headroom {

class StepTables {
 public:
  StepTables() = default;
  // `host` is registered with the device and `device` lies in the arena; both of `bytes`.
  StepTables(uint8_t* host, uint8_t* device, int64_t bytes)
      : host_(host), device_(device), bytes_(bytes) {}

  // REQUIRES: the step whose tables these were has run.
  void Clear() { used_ = needed_ = 0; }

  // Adds a table. If it does not fit it is empty, and Check() fails.
  template <typename T>
  kernels::Table<T> Add(const T* items, size_t count) {
    const int64_t begin = (needed_ + kAlign - 1) / kAlign * kAlign;
    needed_ = begin + static_cast<int64_t>(count * sizeof(T));
    if (needed_ > bytes_) return {};
    std::memcpy(host_ + begin, items, count * sizeof(T));
    used_ = needed_;
    return {reinterpret_cast<const T*>(device_ + begin), reinterpret_cast<const T*>(host_ + begin),
            static_cast<int32_t>(count)};
  }
  template <typename T>
  kernels::Table<T> Add(const std::vector<T>& items) {
    return Add(items.data(), items.size());
  }

  // RESOURCE_EXHAUSTED if a table did not fit: the context is longer than the worker was told.
  absl::Status Check() const {
    if (needed_ <= bytes_) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("the step's tables take ", needed_, " bytes, ", bytes_,
                     " were set aside for them: raise --max-context-tokens"));
  }
  // REQUIRES: Check() is OK.
  absl::Status Upload(Device& device, StreamId stream) {
    CopyArgs copy;
    copy.dst = device_;
    copy.src = host_;
    copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = used_;
    return device.Copy(stream, copy);
  }

 private:
  static constexpr int64_t kAlign = 16;

  uint8_t* host_ = nullptr;
  uint8_t* device_ = nullptr;
  int64_t bytes_ = 0;
  int64_t used_ = 0;
  int64_t needed_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_TABLES_H_
