#include "common/device/cuda/op_timers.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common/device/cuda/cuda_status.h"
#include "common/status.h"

namespace headroom {

absl::Status OpTimers::Init(int pairs) {
  MutexLock lock(&mutex_);
  pairs_.reserve(pairs);
  free_.reserve(pairs);
  running_.reserve(pairs);
  for (int i = 0; i < pairs; ++i) {
    Pair pair;
    for (CudaEvent* event : {&pair.begin, &pair.end}) {
      cudaEvent_t made = nullptr;
      HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventCreate(&made)));
      *event = CudaEvent(made);
    }
    pairs_.push_back(std::move(pair));
    free_.push_back(i);
  }
  return absl::OkStatus();
}

int OpTimers::Begin(cudaStream_t stream, OpAccount* account) {
  if (account == nullptr) return -1;
  int pair;
  {
    MutexLock lock(&mutex_);
    if (free_.empty()) return -1;
    pair = free_.back();
    free_.pop_back();
    pairs_[pair].account = account;
    pairs_[pair].stream = stream;
  }
  if (cudaEventRecord(pairs_[pair].begin.get(), stream) == cudaSuccess) return pair;
  MutexLock lock(&mutex_);
  free_.push_back(pair);
  return -1;
}

void OpTimers::End(cudaStream_t stream, int pair) {
  if (pair < 0) return;
  const bool recorded = cudaEventRecord(pairs_[pair].end.get(), stream) == cudaSuccess;
  MutexLock lock(&mutex_);
  (recorded ? running_ : free_).push_back(pair);
}

void OpTimers::Collect() {
  MutexLock lock(&mutex_);
  // A stream's pairs fire in order: after the first that has not, its others need not be asked.
  std::array<cudaStream_t, 16> behind;
  size_t num_behind = 0;
  size_t kept = 0;
  for (const int index : running_) {
    const Pair& pair = pairs_[index];
    const auto end = behind.begin() + num_behind;
    cudaError_t state = cudaErrorNotReady;
    if (std::find(behind.begin(), end, pair.stream) == end) {
      state = cudaEventQuery(pair.end.get());
      if (state == cudaErrorNotReady && num_behind < behind.size()) {
        behind[num_behind++] = pair.stream;
      }
    }
    if (state == cudaErrorNotReady) {
      running_[kept++] = index;
      continue;
    }
    float ms = 0;
    if (state == cudaSuccess &&
        cudaEventElapsedTime(&ms, pair.begin.get(), pair.end.get()) == cudaSuccess) {
      pair.account->busy_ns.fetch_add(static_cast<int64_t>(ms * 1e6f), std::memory_order_relaxed);
      pair.account->timed_ops.fetch_add(1, std::memory_order_relaxed);
    }
    free_.push_back(index);
  }
  running_.resize(kept);
}

}  // namespace headroom
