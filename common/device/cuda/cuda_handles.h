// Owners of CUDA objects: move-only, destroyed with their owner. Errors of destruction have nobody
// to go to: the object is gone, or the process is about to be.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_CUDA_HANDLES_H_
#define HEADROOM_COMMON_DEVICE_CUDA_CUDA_HANDLES_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

namespace headroom {

template <typename Handle, cudaError_t (*kDestroy)(Handle)>
class CudaHandle {
 public:
  CudaHandle() = default;
  explicit CudaHandle(Handle handle) : handle_(handle) {}
  ~CudaHandle() { reset(); }
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    if (this != &other) {
      reset();
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }

  Handle get() const { return handle_; }

 private:
  void reset() {
    if (handle_ != nullptr) static_cast<void>(kDestroy(handle_));
    handle_ = nullptr;
  }

  Handle handle_ = nullptr;
};

using CudaStream = CudaHandle<cudaStream_t, cudaStreamDestroy>;
using CudaEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;
using CudaGraphExec = CudaHandle<cudaGraphExec_t, cudaGraphExecDestroy>;
using CudaGraph = CudaHandle<cudaGraph_t, cudaGraphDestroy>;
using CudaMemory = CudaHandle<void*, cudaFree>;

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_CUDA_HANDLES_H_
