#include "common/device/cuda/event_clock.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/device/cuda/cuda_status.h"
#include "common/status.h"
#include "common/steady_time.h"

namespace headroom {
namespace {

// The first ones set up what the stream needs; of the others the one that was seen best counts.
constexpr int kFirstTries = 32;
constexpr int64_t kFirstTimeoutNs = 1'000'000'000;
constexpr int64_t kTimeoutNs = 100'000;

}  // namespace

absl::Status EventClock::Init() {
  cudaStream_t stream = nullptr;
  HEADROOM_RETURN_IF_ERROR(
      HEADROOM_CUDA_STATUS(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
  stream_ = CudaStream(stream);
  for (CudaEvent* event : {&anchor_, &spare_}) {
    cudaEvent_t made = nullptr;
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventCreate(&made)));
    *event = CudaEvent(made);
  }
  int64_t best_ns = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kFirstTries; ++i) {
    int64_t begin_ns = 0;
    int64_t end_ns = 0;
    if (!Measure(kFirstTimeoutNs, &begin_ns, &end_ns)) {
      return absl::DeadlineExceededError("an event on an idle stream does not fire");
    }
    if (end_ns - begin_ns >= best_ns) continue;
    best_ns = end_ns - begin_ns;
    anchor_ns_ = begin_ns + best_ns / 2;
    std::swap(anchor_, spare_);
  }
  tried_ns_ = SteadyNs();
  return absl::OkStatus();
}

void EventClock::Refresh() {
  if (SteadyNs() - tried_ns_ >= kMoveEveryNs) MoveAnchor();
}

bool EventClock::MoveAnchor() {
  tried_ns_ = SteadyNs();
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  int64_t at_ns = 0;
  if (!Measure(kTimeoutNs, &begin_ns, &end_ns) || !TimeOf(spare_.get(), &at_ns)) return false;
  // As long as the clocks agree to within what can be seen, times go on as they were: a jump by what
  // one measurement is off would show as slices that overlap.
  anchor_ns_ = std::clamp(at_ns, begin_ns, end_ns);
  std::swap(anchor_, spare_);
  return true;
}

bool EventClock::TimeOf(cudaEvent_t event, int64_t* ns) const {
  float ms = 0;
  if (cudaEventElapsedTime(&ms, anchor_.get(), event) != cudaSuccess) return false;
  *ns = anchor_ns_ + static_cast<int64_t>(static_cast<double>(ms) * 1e6);
  return true;
}

bool EventClock::Measure(int64_t timeout_ns, int64_t* begin_ns, int64_t* end_ns) {
  *begin_ns = SteadyNs();
  if (cudaEventRecord(spare_.get(), stream_.get()) != cudaSuccess) return false;
  for (;;) {
    const cudaError_t state = cudaEventQuery(spare_.get());
    *end_ns = SteadyNs();
    if (state != cudaErrorNotReady) return state == cudaSuccess;
    if (*end_ns - *begin_ns > timeout_ns) return false;
  }
}

}  // namespace headroom
