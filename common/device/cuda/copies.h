// Copies by the GPU's copy engines, as few calls as there can be. They return the launch's own error.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_COPIES_H_
#define HEADROOM_COMMON_DEVICE_CUDA_COPIES_H_

#include <cuda_runtime_api.h>

#include "absl/types/span.h"
#include "common/device/device.h"

namespace headroom {

cudaError_t EnqueueCopy(const CopyArgs& copy, cudaStream_t stream);

// Likewise all of `copies`, in no order among themselves, row by row in batches: an engine that is handed
// one piece after the other stands still between them. An H200 copies pieces of 256 KiB at 36 GB/s one by
// one, of 1 MiB at 48, and 55 without a gap. Not while `stream` is captured.
cudaError_t EnqueueCopies(absl::Span<const CopyArgs> copies, cudaStream_t stream);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_COPIES_H_
