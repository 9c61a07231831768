// Measures how long operations took on the GPU: a pair of events around each, read when both have
// fired. Thread-safe. Pairs are made once; when all are in use an operation goes unmeasured.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_

#include <cuda_runtime_api.h>

#include <vector>

#include "absl/status/status.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/device.h"
#include "common/mutex.h"

namespace headroom {

class OpTimers {
 public:
  absl::Status Init(int pairs);

  // The index of a pair whose first event is recorded on `stream`, or -1: no account, or no pair.
  int Begin(cudaStream_t stream, OpAccount* account);
  // Records the second event. The account is written by a later Collect(), once both have fired.
  void End(cudaStream_t stream, int pair);
  // Adds what has ended to the accounts. To be called after an event is seen fired and before its
  // caller learns of it: later the accounts may be gone.
  void Collect();

 private:
  struct Pair {
    CudaEvent begin;
    CudaEvent end;
    OpAccount* account = nullptr;
    cudaStream_t stream = nullptr;
  };

  Mutex mutex_;
  std::vector<Pair> pairs_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> free_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> running_ ABSL_GUARDED_BY(mutex_);  // ended ones, in the order of End()
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_
