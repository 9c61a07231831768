// When timing events fired, on the host's clock (SteadyNs()).
//
// An anchor is an event whose host time is known: it is recorded on a stream of its own, where nothing
// else runs, and polled until it has fired, so that it fired between two readings of the host's clock,
// some microseconds apart. Other events are so many milliseconds from it, as a float: 8 ns of
// resolution after 0.1 s, 8 us after 100 s; and clocks that differ by 50 millionths are 5 us apart after
// 0.1 s. So the anchor moves with time.
// Not thread-safe.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_EVENT_CLOCK_H_
#define HEADROOM_COMMON_DEVICE_CUDA_EVENT_CLOCK_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "common/device/cuda/cuda_handles.h"

namespace headroom {

class EventClock {
 public:
  static constexpr int64_t kMoveEveryNs = 100'000'000;

  // Sets the first anchor. DEADLINE_EXCEEDED if the GPU does not respond; CUDA's errors.
  absl::Status Init();

  // To be called now and then: moves the anchor when it is older than kMoveEveryNs.
  void Refresh();
  // The same, whatever its age. False if the new one does not fire within 0.1 ms: the old one stays.
  bool MoveAnchor();

  // When `event` fired, in SteadyNs(); may be before the anchor. False if it has not fired, or CUDA
  // does not say. REQUIRES: Init() has succeeded.
  bool TimeOf(cudaEvent_t event, int64_t* ns) const;

 private:
  // Records spare_ and polls it: it fired in [*begin_ns, *end_ns].
  bool Measure(int64_t timeout_ns, int64_t* begin_ns, int64_t* end_ns);

  CudaStream stream_;
  CudaEvent anchor_;
  CudaEvent spare_;
  int64_t anchor_ns_ = 0;
  int64_t tried_ns_ = 0;  // to move it
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_EVENT_CLOCK_H_
