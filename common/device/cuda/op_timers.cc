#include "common/device/cuda/op_timers.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/cuda/cuda_status.h"
#include "common/log.h"
#include "common/status.h"
#include "common/steady_time.h"

namespace headroom {
namespace {

// Operations in flight: of a decode step some hundreds, with many tiles thousands, two steps deep in two
// contexts.
constexpr int kTracePairs = 16384;
constexpr int64_t kSayEveryNs = 1'000'000'000;

}  // namespace

absl::Status OpTimers::MakePairs(int count, std::unique_ptr<Pair[]>* pairs, PairList* free) {
  pairs->reset(new Pair[count]);
  free->reserve(count);
  for (int i = 0; i < count; ++i) {
    Pair& pair = (*pairs)[i];
    for (CudaEvent* event : {&pair.begin, &pair.end}) {
      cudaEvent_t made = nullptr;
      HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventCreate(&made)));
      *event = CudaEvent(made);
    }
    pair.home = free;
    free->push_back(&pair);
  }
  return absl::OkStatus();
}

absl::Status OpTimers::Init(int pairs) {
  MutexLock lock(&mutex_);
  running_.reserve(pairs);
  return MakePairs(pairs, &account_pairs_, &free_);
}

void OpTimers::AddStream(cudaStream_t stream, absl::string_view name) {
  MutexLock lock(&mutex_);
  rows_.push_back({stream, MakeTraceTrack(name), 0});
}

OpTimers::Row* OpTimers::RowOf(cudaStream_t stream) {
  for (Row& row : rows_) {
    if (row.stream == stream) return &row;
  }
  return nullptr;
}

// Whether slices can be drawn; the first time it makes what that takes, some tens of milliseconds.
bool OpTimers::MayTrace() {
  if (!TraceOn()) return false;
  if (tracing_ == Tracing::kNotYet) {
    const absl::Status started = StartTracing();
    tracing_ = started.ok() ? Tracing::kReady : Tracing::kFailed;
    if (!started.ok()) {
      LogWarning(absl::StrCat("trace: without the GPU's streams: ", started.message()));
    }
  }
  return tracing_ == Tracing::kReady;
}

absl::Status OpTimers::StartTracing() {
  running_.reserve(running_.capacity() + kTracePairs);
  HEADROOM_RETURN_IF_ERROR(MakePairs(kTracePairs, &trace_pairs_, &trace_free_));
  return clock_.Init();
}

OpTimers::Pair* OpTimers::Take(cudaStream_t stream, OpAccount* account, const char* op,
                               int64_t bytes) {
  Pair* pair;
  {
    MutexLock lock(&mutex_);
    const bool traced = MayTrace() && RowOf(stream) != nullptr;
    if (account != nullptr && free_.empty()) account = nullptr;
    if (account == nullptr && !traced) return nullptr;
    PairList& free = account != nullptr ? free_ : trace_free_;
    if (free.empty()) {
      ++untraced_;
      return nullptr;
    }
    pair = free.back();
    free.pop_back();
    pair->account = account;
    pair->stream = stream;
    pair->op = traced ? op : nullptr;
    pair->bytes = bytes;
  }
  if (cudaEventRecord(pair->begin.get(), stream) == cudaSuccess) return pair;
  MutexLock lock(&mutex_);
  pair->home->push_back(pair);
  return nullptr;
}

void OpTimers::End(cudaStream_t stream, Pair* pair) {
  if (pair == nullptr) return;
  const bool recorded = cudaEventRecord(pair->end.get(), stream) == cudaSuccess;
  MutexLock lock(&mutex_);
  (recorded ? running_ : *pair->home).push_back(pair);
}

void OpTimers::Collect() {
  MutexLock lock(&mutex_);
  if (TraceOn() && tracing_ == Tracing::kReady) RefreshClock();
  // A stream's pairs fire in order: after the first that has not, its others need not be asked.
  std::array<cudaStream_t, 16> behind;
  size_t num_behind = 0;
  size_t kept = 0;
  for (Pair* const pair : running_) {
    const auto end = behind.begin() + num_behind;
    cudaError_t state = cudaErrorNotReady;
    if (std::find(behind.begin(), end, pair->stream) == end) {
      state = cudaEventQuery(pair->end.get());
      if (state == cudaErrorNotReady && num_behind < behind.size()) {
        behind[num_behind++] = pair->stream;
      }
    }
    if (state == cudaErrorNotReady) {
      running_[kept++] = pair;
      continue;
    }
    if (state == cudaSuccess) Read(*pair);
    pair->home->push_back(pair);
  }
  running_.resize(kept);
}

void OpTimers::RefreshClock() {
  clock_.Refresh();
  if (untraced_ == 0 || SteadyNs() - untraced_said_ns_ < kSayEveryNs) return;
  LogWarning(absl::StrCat("trace: ", std::exchange(untraced_, 0),
                          " operations of the GPU are left out"));
  untraced_said_ns_ = SteadyNs();
}

void OpTimers::Read(const Pair& pair) {
  float ms = 0;
  if (cudaEventElapsedTime(&ms, pair.begin.get(), pair.end.get()) != cudaSuccess) return;
  const auto duration_ns = static_cast<int64_t>(ms * 1e6f);
  if (pair.account != nullptr) {
    pair.account->busy_ns.fetch_add(duration_ns, std::memory_order_relaxed);
    pair.account->timed_ops.fetch_add(1, std::memory_order_relaxed);
  }
  if (pair.op != nullptr) TracePair(pair, duration_ns);
}

// Its length is that of the pair, not a difference of two times of the clock, each rounded: an operation
// takes microseconds. What rounding, or an anchor that moves, would have begin before the operation in
// front has ended begins where that ends.
void OpTimers::TracePair(const Pair& pair, int64_t duration_ns) {
  Row* const row = RowOf(pair.stream);
  int64_t end_ns = 0;
  if (row == nullptr || !clock_.TimeOf(pair.end.get(), &end_ns)) return;
  const int64_t begin_ns = std::max(end_ns - duration_ns, row->traced_until_ns);
  end_ns = std::max(end_ns, begin_ns);
  row->traced_until_ns = end_ns;
  TraceSliceOn(row->track, pair.op, begin_ns, end_ns, pair.bytes > 0 ? "bytes" : nullptr,
               pair.bytes);
}

}  // namespace headroom
