#include "common/device/card_probe.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/cuda_status.h"
#include "common/status.h"
#include "kernels/cuda/kernels.h"

namespace headroom {
namespace {

// Reads of one measurement, so that the launches' own time does not show: one of a GiB takes a
// third of a millisecond.
constexpr int kReads = 8;
constexpr int kMeasurements = 3;

absl::StatusOr<CudaEvent> NewEvent() {
  cudaEvent_t event = nullptr;
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventCreate(&event)));
  return CudaEvent(event);
}

}  // namespace

absl::StatusOr<int64_t> CardMemoryInUse() {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaMemGetInfo(&free_bytes, &all_bytes)));
  return static_cast<int64_t>(all_bytes - free_bytes);
}

absl::StatusOr<double> CardReadRate(uint8_t* data, int64_t bytes) {
  cudaStream_t created = nullptr;
  HEADROOM_RETURN_IF_ERROR(
      HEADROOM_CUDA_STATUS(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking)));
  const CudaStream stream(created);
  HEADROOM_ASSIGN_OR_RETURN(const CudaEvent begin, NewEvent());
  HEADROOM_ASSIGN_OR_RETURN(const CudaEvent end, NewEvent());
  double best = 0;
  for (int i = 0; i < kMeasurements; ++i) {
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventRecord(begin.get(), stream.get())));
    for (int read = 0; read < kReads; ++read) {
      HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(kernels::cuda::LaunchReadMemory(
          data, bytes, reinterpret_cast<uint32_t*>(data), stream.get())));
    }
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventRecord(end.get(), stream.get())));
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventSynchronize(end.get())));
    float milliseconds = 0;
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDA_STATUS(cudaEventElapsedTime(&milliseconds, begin.get(), end.get())));
    best = std::max(best, 1e3 * kReads * static_cast<double>(bytes) / milliseconds);
  }
  return best;
}

}  // namespace headroom
