// The device that is an NVIDIA GPU: the first that the driver shows (CUDA_VISIBLE_DEVICES chooses).
//
// The CUDA runtime is linked statically and opens the driver when the first device is created; this
// header and its users need neither. Streams are CUDA streams, recordings CUDA graphs.
//
// Accounts: bytes are counted where an operation is enqueued, or replayed; time is measured by a
// pair of events around it and added at the first Synchronize() or Done() that sees it over. An
// operation that is enqueued while all pairs are in use, or recorded, counts its bytes only; of Attend
// every eighth is timed (OpAccount::EstimatedBusyNs()).
//
// While a trace is written (common/trace.h) every operation is put between events, and what a stream
// does is a row of the trace with the stream's name: Copy, CopyKvRows and Attend with their bytes, a
// replay as one. The events keep kernels from overlapping, so that a traced step takes longer.
//
// Host memory is registered in pieces that end at multiples of kRegistrationBytes from its
// beginning; no operation may name a range that crosses such a border.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_CUDA_DEVICE_H_
#define HEADROOM_COMMON_DEVICE_CUDA_CUDA_DEVICE_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "common/device/device.h"

namespace headroom {

struct CudaDeviceOptions {
  int64_t arena_bytes = 0;  // 0: what is free less 1 GiB
  // For tests: copies begin up to 0.3 ms late, drawn from this seed. What is computed may not change.
  std::optional<uint64_t> delay_seed = std::nullopt;
};

// UNAVAILABLE if there is no driver or it shows no GPU. Leaves nothing on the GPU.
absl::Status CheckCudaDriver();

// UNAVAILABLE if there is no driver, no GPU, or one that the kernels cannot run on (compute
// capability below 8.0); RESOURCE_EXHAUSTED names the bytes asked for and the bytes free.
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice(const CudaDeviceOptions& options);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_CUDA_DEVICE_H_
