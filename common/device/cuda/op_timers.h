// Measures how long operations took on the GPU: a pair of events around each, read when both have
// fired. Thread-safe. Pairs are made once; when all are in use an operation goes unmeasured.
//
// Operations are timed for their accounts, and all of them while a trace is written: then each becomes
// a slice of its stream's row when it has ended (common/trace.h). What is timed for an account is the
// same with and without a trace, whose other operations have pairs of their own, made when the first
// of them comes.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/event_clock.h"
#include "common/device/device.h"
#include "common/mutex.h"
#include "common/trace.h"

namespace headroom {

class OpTimers {
 public:
  // An operation's, from Begin() to End().
  class Pair {
    friend class OpTimers;
    CudaEvent begin;
    CudaEvent end;
    std::vector<Pair*>* home = nullptr;  // where it goes when it is free
    OpAccount* account = nullptr;
    cudaStream_t stream = nullptr;
    const char* op = nullptr;  // null: not traced
    int64_t bytes = 0;
  };

  absl::Status Init(int pairs);
  // The row of `stream` in a trace; an operation of a stream that has none is not traced.
  void AddStream(cudaStream_t stream, absl::string_view name);

  // A pair whose first event is recorded on `stream`, to be handed to End(); or null: nothing to time,
  // or no pair. `account` may be null; `op` is a literal, `bytes` what it moves, 0: not said.
  // REQUIRES: the stream does not capture.
  Pair* Begin(cudaStream_t stream, OpAccount* account, const char* op, int64_t bytes = 0) {
    return account == nullptr && !TraceOn() ? nullptr : Take(stream, account, op, bytes);
  }
  // Records the second event. The account is written by a later Collect(), once both have fired.
  void End(cudaStream_t stream, Pair* pair);
  // Adds what has ended to the accounts and to the trace. To be called after an event is seen fired and
  // before its caller learns of it: later the accounts may be gone.
  void Collect();

 private:
  using PairList = std::vector<Pair*>;
  struct Row {
    cudaStream_t stream;
    TraceTrack track;
    int64_t traced_until_ns;
  };

  static absl::Status MakePairs(int count, std::unique_ptr<Pair[]>* pairs, PairList* free);
  Pair* Take(cudaStream_t stream, OpAccount* account, const char* op, int64_t bytes);
  void RefreshClock() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool MayTrace() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status StartTracing() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Row* RowOf(cudaStream_t stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Read(const Pair& pair) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TracePair(const Pair& pair, int64_t duration_ns) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  // A pair is its list's, or its operation's from Take() to End(), or in running_.
  std::unique_ptr<Pair[]> account_pairs_;
  std::unique_ptr<Pair[]> trace_pairs_;
  PairList free_ ABSL_GUARDED_BY(mutex_);
  PairList trace_free_ ABSL_GUARDED_BY(mutex_);
  PairList running_ ABSL_GUARDED_BY(mutex_);  // ended ones, in the order of End()

  enum class Tracing { kNotYet, kReady, kFailed };
  Tracing tracing_ ABSL_GUARDED_BY(mutex_) = Tracing::kNotYet;
  EventClock clock_ ABSL_GUARDED_BY(mutex_);
  std::vector<Row> rows_ ABSL_GUARDED_BY(mutex_);
  int64_t untraced_ ABSL_GUARDED_BY(mutex_) = 0;  // for want of a pair, since it was last said
  int64_t untraced_said_ns_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_OP_TIMERS_H_
