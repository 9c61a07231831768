// What a CUDA call returned, as a Status that names the call and where it stands.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_CUDA_STATUS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

// OK, RESOURCE_EXHAUSTED for want of memory, INTERNAL otherwise.
#define HEADROOM_CUDA_STATUS(call) ::headroom::CudaStatus((call), #call, __FILE__, __LINE__)

namespace headroom {

inline absl::Status CudaStatus(cudaError_t error, absl::string_view call, absl::string_view file,
                               int line) {
  if (error == cudaSuccess) return absl::OkStatus();
  const absl::StatusCode code = error == cudaErrorMemoryAllocation
                                    ? absl::StatusCode::kResourceExhausted
                                    : absl::StatusCode::kInternal;
  return absl::Status(code, absl::StrCat(call, ": ", cudaGetErrorName(error), ": ",
                                         cudaGetErrorString(error), " (", file, ":", line, ")"));
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_CUDA_STATUS_H_
