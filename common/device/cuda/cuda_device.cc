#include "common/device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/checked_math.h"
#include "common/device/arena.h"
#include "common/device/cuda/copies.h"
#include "common/device/cuda/copy_kv_rows.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/cuda_status.h"
#include "common/device/cuda/host_registrations.h"
#include "common/device/cuda/op_timers.h"
#include "common/device/cuda/wide_attend.h"
#include "common/device/cuda/wide_gemm.h"
#include "common/device/kv_bytes.h"
#include "common/device/launch_check.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/status.h"
#include "common/trace.h"
#include "kernels/cuda/kernels.h"

namespace headroom {
namespace {

constexpr int kMaxStreams = 16;
constexpr int kMaxEvents = 4096;
// Operations with an account that are in flight: a step of a few hundred, three deep, in two
// contexts.
constexpr int kTimerPairs = 4096;
// Of so many Attend operations of an account one is timed. Events around each of Llama-3-8B's 32 took 4%
// of a decode step.
constexpr int kTimedOf = 16;
constexpr int kStreamWords = 32;
static_assert(kStreamWords >= 1 + kernels::cuda::kChainWords);
// A test's delay of a copy: as long as copying 16 MiB takes.
constexpr uint64_t kMostDelayUs = 300;
// Start-up's copies, and what is still enqueued when the device is destroyed.
constexpr absl::Duration kSetupTimeout = absl::Minutes(1);

struct Event {
  CudaEvent handle;
  std::atomic<int32_t> stream{-1};  // that records it
  // Its latest record was made in a recording: it orders nothing outside.
  std::atomic<bool> captured{false};
};

// Polls until `query` says something else than 'not ready', quickly at first: a step's events fire
// within microseconds of each other, a chunk's within tens of milliseconds.
template <typename Query>
cudaError_t PollUntil(absl::Time deadline, Query&& query) {
  const absl::Time spin_until = absl::Now() + absl::Microseconds(100);
  for (;;) {
    const cudaError_t state = query();
    if (state != cudaErrorNotReady) return state;
    const absl::Time now = absl::Now();
    if (now >= deadline) return cudaErrorNotReady;
    if (now > spin_until) absl::SleepFor(std::min(deadline - now, absl::Microseconds(20)));
  }
}

class CudaDevice : public Device {
 public:
  CudaDevice(std::string name, CudaMemory memory, int64_t bytes,
             std::optional<uint64_t> delay_seed)
      : name_(std::move(name)),
        delay_seed_(delay_seed),
        memory_(std::move(memory)),
        arena_(static_cast<uint8_t*>(memory_.get()), bytes),
        events_(new Event[kMaxEvents]) {}

  // Waits for what is enqueued, at most kSetupTimeout.
  ~CudaDevice() override {
    const absl::Time deadline = absl::Now() + kSetupTimeout;
    for (int i = 0; i < num_streams_; ++i) {
      PollUntil(deadline, [&] { return cudaStreamQuery(streams_[i].get()); });
    }
  }

  absl::Status Init() {
    HEADROOM_ASSIGN_OR_RETURN(setup_stream_, NewStream());
    HEADROOM_ASSIGN_OR_RETURN(upload_stream_, NewStream());
    HEADROOM_RETURN_IF_ERROR(timers_.Init(kTimerPairs));
    HEADROOM_ASSIGN_OR_RETURN(words_, Zeroed(kMaxStreams * kStreamWords * sizeof(uint32_t)));
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(
        cudaMemsetAsync(arena_.base(), 0, static_cast<size_t>(arena_.capacity_bytes()),
                        setup_stream_.get())));
    HEADROOM_RETURN_IF_ERROR(AwaitSetup());
    // Without cuBLASLt, or without room for it, wide products are several times slower.
    if (arena_.capacity_bytes() < 16 * WideGemm::kWorkspaceBytes) return absl::OkStatus();
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const workspace,
                              Allocate(WideGemm::kWorkspaceBytes, "cuBLASLt's workspace"));
    absl::StatusOr<std::unique_ptr<WideGemm>> wide_gemm = WideGemm::Open(workspace);
    if (!wide_gemm.ok()) {
      LogWarning(absl::StrCat("matrix products of many rows run without cuBLASLt: ",
                              wide_gemm.status().message()));
      return absl::OkStatus();
    }
    wide_gemm_ = *std::move(wide_gemm);
    return absl::OkStatus();
  }

  absl::string_view name() const override { return name_; }

  // ---- Memory.
  absl::StatusOr<uint8_t*> Allocate(int64_t bytes, absl::string_view what) override {
    MutexLock lock(&mutex_);
    return arena_.Allocate(bytes, what);
  }
  ArenaUse arena_use() const override {
    MutexLock lock(&mutex_);
    return {arena_.capacity_bytes(), arena_.used_bytes(), arena_.used_bytes()};
  }
  absl::Status RegisterHost(void* data, int64_t bytes) override {
    return host_.Add(static_cast<uint8_t*>(data), bytes);
  }
  absl::Status UnregisterHost(void* data) override {
    return host_.Remove(static_cast<const uint8_t*>(data));
  }

  kernels::ElementType product_type() const override { return kernels::ElementType::kBFloat16; }
  absl::Status PrepareGemm(int64_t n, int64_t k) override {
    if (wide_gemm_ == nullptr) return absl::OkStatus();
    // Whatever lies at the arena's beginning serves as the matrix of the products that load code.
    if (PackedBytes(n, k) > arena_.capacity_bytes()) return absl::OkStatus();
    MutexLock lock(&setup_mutex_);
    HEADROOM_RETURN_IF_ERROR(
        Note(wide_gemm_->Prepare(n, k, arena_.base(), setup_stream_.get())));
    return AwaitSetup();
  }
  int64_t PackedBytes(int64_t n, int64_t k) const override {
    return kernels::PackedWeightBytes(n, k);
  }
  absl::Status LoadWeightRows(const kernels::BFloat16* rows_data, int64_t row_begin, int64_t rows,
                              int64_t n, int64_t k, uint8_t* packed) override {
    if (!arena_.Contains(packed, PackedBytes(n, k))) {
      return ForeignAddressError("LoadWeightRows", packed);
    }
    if (!RangeFits(row_begin, rows, n)) {
      return absl::InternalError(absl::StrCat("LoadWeightRows: ", rows, " rows from ", row_begin,
                                              " of a matrix of ", n));
    }
    constexpr int64_t kElement = sizeof(kernels::BFloat16);
    return Upload(packed + row_begin * k * kElement, rows_data, rows * k * kElement);
  }
  absl::Status FillRandom(const kernels::FillRandomArgs& args) override {
    if (!arena_.Contains(args.out, PackedBytes(args.n, args.k))) {
      return ForeignAddressError("FillRandom", args.out);
    }
    MutexLock lock(&setup_mutex_);
    HEADROOM_RETURN_IF_ERROR(Note(
        HEADROOM_CUDA_STATUS(kernels::cuda::LaunchFillRandom(args, setup_stream_.get()))));
    return AwaitSetup();
  }
  absl::Status Upload(uint8_t* dst, const void* src, int64_t bytes) override {
    if (!arena_.Contains(dst, bytes)) return ForeignAddressError("Upload", dst);
    if (bytes == 0) return absl::OkStatus();
    MutexLock lock(&upload_mutex_);
    HEADROOM_RETURN_IF_ERROR(Note(HEADROOM_CUDA_STATUS(
        cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                        upload_stream_.get()))));
    return Await(upload_stream_);
  }

  // ---- Streams and events.
  absl::StatusOr<StreamId> CreateStream(absl::string_view name) override {
    MutexLock lock(&mutex_);
    if (num_streams_ == kMaxStreams) return absl::ResourceExhaustedError("too many streams");
    HEADROOM_ASSIGN_OR_RETURN(streams_[num_streams_], NewStream());
    timers_.AddStream(streams_[num_streams_].get(), name);
    return StreamId{num_streams_++};
  }
  absl::StatusOr<EventId> CreateEvent() override {
    MutexLock lock(&mutex_);
    if (num_events_ == kMaxEvents) return absl::ResourceExhaustedError("too many events");
    cudaEvent_t event = nullptr;
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDA_STATUS(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)));
    events_[num_events_].handle = CudaEvent(event);
    return EventId{num_events_++};
  }

  absl::Status Record(StreamId stream, EventId id) override {
    Event& event = events_[id.index];
    if (Recording* recording = active_[stream.index]) {
      // It orders the recording's own operations, which run in order anyway.
      recording->events.push_back(id.index);
      event.captured.store(true, std::memory_order_relaxed);
      return absl::OkStatus();
    }
    int32_t owner = -1;
    if (!event.stream.compare_exchange_strong(owner, stream.index) && owner != stream.index) {
      return absl::InternalError("an event is recorded on two streams");
    }
    event.captured.store(false, std::memory_order_relaxed);
    return Note(HEADROOM_CUDA_STATUS(
        cudaEventRecord(event.handle.get(), streams_[stream.index].get())));
  }

  absl::Status Wait(StreamId stream, EventId id, OpAccount* account) override {
    if (const Recording* recording = active_[stream.index]) {
      const std::vector<int32_t>& events = recording->events;
      if (std::find(events.begin(), events.end(), id.index) == events.end()) {
        return absl::FailedPreconditionError("a recording waits for an event outside of it");
      }
      return absl::OkStatus();  // recorded on the same stream: in order already
    }
    HEADROOM_RETURN_IF_ERROR(CheckNotCaptured(events_[id.index]));
    const cudaStream_t on = streams_[stream.index].get();
    OpTimers::Pair* const timer = timers_.Begin(on, account, "Wait");
    const cudaError_t error = cudaStreamWaitEvent(on, events_[id.index].handle.get(), 0);
    timers_.End(on, timer);
    return Note(HEADROOM_CUDA_STATUS(error));
  }

  absl::Status Synchronize(EventId id, absl::Duration timeout) override {
    if (recording_streams_.load() != 0) {
      return absl::FailedPreconditionError("Synchronize while a stream is recording");
    }
    HEADROOM_RETURN_IF_ERROR(CheckNotCaptured(events_[id.index]));
    const cudaEvent_t event = events_[id.index].handle.get();
    const cudaError_t state =
        PollUntil(absl::Now() + timeout, [&] { return cudaEventQuery(event); });
    if (state == cudaErrorNotReady) {
      return absl::DeadlineExceededError(
          absl::StrCat("the device has not ended its work within ", absl::FormatDuration(timeout)));
    }
    timers_.Collect();
    return Note(CudaStatus(state, "cudaEventQuery", __FILE__, __LINE__));
  }
  bool Done(EventId id) override {
    const cudaError_t state = cudaEventQuery(events_[id.index].handle.get());
    if (state == cudaSuccess) timers_.Collect();
    if (state != cudaSuccess && state != cudaErrorNotReady) {
      Note(CudaStatus(state, "cudaEventQuery", __FILE__, __LINE__)).IgnoreError();
    }
    return state == cudaSuccess;
  }

  // ---- Operations.
  absl::Status Copy(StreamId stream, const CopyArgs& args, OpAccount* account) override {
    HEADROOM_RETURN_IF_ERROR(CheckCopyOn(stream, args));
    if (args.width_bytes == 0 || args.height == 0) return absl::OkStatus();
    HEADROOM_RETURN_IF_ERROR(DelayCopy(stream));
    return Enqueue(stream, "Copy", account, args.width_bytes * args.height,
                   [&](cudaStream_t on) { return EnqueueCopy(args, on); });
  }
  absl::Status CopyEach(StreamId stream, absl::Span<const CopyArgs> copies,
                        OpAccount* account) override {
    if (active_[stream.index] != nullptr) return Device::CopyEach(stream, copies, account);
    int64_t bytes = 0;
    for (const CopyArgs& copy : copies) {
      HEADROOM_RETURN_IF_ERROR(CheckCopyOn(stream, copy));
      bytes += copy.width_bytes * copy.height;
    }
    if (bytes == 0) return absl::OkStatus();
    HEADROOM_RETURN_IF_ERROR(DelayCopy(stream));
    return Enqueue(stream, "Copy", account, bytes,
                   [&](cudaStream_t on) { return EnqueueCopies(copies, on); });
  }
  absl::Status PostQueries(StreamId stream, const kernels::PostQueriesArgs& args) override {
    HEADROOM_RETURN_IF_ERROR(CheckPost(
        args, [this](const void* data, int64_t bytes) { return arena_.Contains(data, bytes); },
        [this](const void* data, int64_t bytes) { return host_.Contain(data, bytes); }));
    return Enqueue(stream, "PostQueries", nullptr, 0, [&](cudaStream_t on) {
      return kernels::cuda::LaunchPostQueries(args, on);
    });
  }
  absl::Status AwaitPartials(StreamId stream, const kernels::AwaitPartialsArgs& args,
                             OpAccount* account) override {
    HEADROOM_RETURN_IF_ERROR(CheckAwait(args, [this](const void* data, int64_t bytes) {
      return host_.Contain(data, bytes);
    }));
    return Enqueue(stream, "AwaitPartials", account, 0, [&](cudaStream_t on) {
      return kernels::cuda::LaunchAwaitPartials(args, on);
    });
  }
  absl::Status MergePartials(StreamId s, const kernels::MergePartialsArgs& a) override {
    return Launch<&kernels::cuda::LaunchMergePartials>(s, "MergePartials", a, nullptr,
                                                       /*host_too=*/true);
  }
  absl::Status Embed(StreamId s, const kernels::EmbedArgs& a) override {
    return Launch<&kernels::cuda::LaunchEmbed>(s, "Embed", a);
  }
  absl::Status RmsNorm(StreamId s, const kernels::RmsNormArgs& a) override {
    return Launch<&kernels::cuda::LaunchRmsNorm>(s, "RmsNorm", a);
  }
  absl::Status Gemm(StreamId s, const kernels::GemmArgs& a) override {
    if (wide_gemm_ == nullptr || !WideGemm::Takes(a)) {
      return Launch<&kernels::cuda::LaunchGemm>(s, "Gemm", a);
    }
    HEADROOM_RETURN_IF_ERROR(CheckArenaRanges("Gemm", a));
    return Enqueue(s, "Gemm", nullptr, 0, [&](cudaStream_t on) { return wide_gemm_->Run(a, on); });
  }
  absl::Status GatedGemm(StreamId s, const kernels::GatedGemmArgs& a) override {
    if (!kernels::cuda::IsSkinny(a.gemm) || a.gemm.w.n != 2 * a.swiglu.width) {
      return Device::GatedGemm(s, a);
    }
    return Launch<&kernels::cuda::LaunchGatedGemm>(s, "GatedGemm", a);
  }
  absl::Status SwiGlu(StreamId s, const kernels::SwiGluArgs& a) override {
    return Launch<&kernels::cuda::LaunchSwiGlu>(s, "SwiGlu", a);
  }
  absl::Status RopeTable(StreamId s, const kernels::RopeTableArgs& a) override {
    return Launch<&kernels::cuda::LaunchRopeTable>(s, "RopeTable", a);
  }
  absl::Status RopeAppend(StreamId s, const kernels::RopeAppendArgs& a) override {
    return Launch<&kernels::cuda::LaunchRopeAppend>(s, "RopeAppend", a);
  }
  absl::Status Chain(StreamId s, absl::Span<const kernels::ChainOp> ops) override {
    while (!ops.empty()) {
      const size_t taken = kernels::cuda::ChainLength(ops.data(), ops.size());
      if (taken < 2) {
        HEADROOM_RETURN_IF_ERROR(RunAlone(s, ops.front()));
        ops.remove_prefix(1);
        continue;
      }
      const absl::Span<const kernels::ChainOp> chain = ops.first(taken);
      for (const kernels::ChainOp& op : chain) {
        HEADROOM_RETURN_IF_ERROR(
            std::visit([&](const auto& args) { return CheckArenaRanges("Chain", args); }, op));
      }
      HEADROOM_RETURN_IF_ERROR(Enqueue(s, "Chain", nullptr, 0, [&](cudaStream_t on) {
        return kernels::cuda::LaunchChain(chain.data(), chain.size(), Words(s) + 1, on);
      }));
      ops.remove_prefix(taken);
    }
    return absl::OkStatus();
  }
  absl::Status Attend(StreamId s, const kernels::AttendArgs& a, OpAccount* account) override {
    const auto enqueue = [&](cudaStream_t on) {
      MutexLock lock(&wide_mutex_);
      return wide_.Attend(a, Words(s), on);
    };
    return Launch(s, "Attend", a, account, /*host_too=*/false, enqueue, kTimedOf);
  }
  absl::Status PrepareWideAttend(const kernels::WideShape& shape, float* scratch,
                                 int64_t scratch_floats) override {
    if (!arena_.Contains(scratch, scratch_floats * static_cast<int64_t>(sizeof(float)))) {
      return ForeignAddressError("PrepareWideAttend", scratch);
    }
    MutexLock lock(&setup_mutex_);
    {
      MutexLock wide_lock(&wide_mutex_);
      HEADROOM_RETURN_IF_ERROR(wide_.Prepare(shape, scratch, scratch_floats, setup_stream_.get()));
    }
    return AwaitSetup();
  }
  WideAttendUse wide_attend_use() const override {
    MutexLock lock(&wide_mutex_);
    return wide_.use();
  }
  int64_t plans_built() const override {
    return wide_.plans_built() + (wide_gemm_ == nullptr ? 0 : wide_gemm_->plans());
  }
  absl::Status CopyKvRows(StreamId s, const kernels::CopyKvRowsArgs& a,
                          OpAccount* account) override {
    HEADROOM_RETURN_IF_ERROR(DelayCopy(s));
    return Launch<&EnqueueCopyKvRows>(s, "CopyKvRows", a, account, /*host_too=*/true);
  }
  absl::Status SoftCap(StreamId s, const kernels::SoftCapArgs& a) override {
    return Launch<&kernels::cuda::LaunchSoftCap>(s, "SoftCap", a);
  }
  absl::Status Sample(StreamId s, const kernels::SampleArgs& a) override {
    return Launch<&kernels::cuda::LaunchSample>(s, "Sample", a);
  }

  // ---- Recordings.
  absl::Status BeginRecording(StreamId stream) override {
    MutexLock lock(&mutex_);
    if (active_[stream.index] != nullptr) {
      return absl::FailedPreconditionError("the stream is recording already");
    }
    // Relaxed: what a capture must not do is refused above; other threads go on as they were.
    HEADROOM_RETURN_IF_ERROR(NoteLocked(HEADROOM_CUDA_STATUS(cudaStreamBeginCapture(
        streams_[stream.index].get(), cudaStreamCaptureModeRelaxed))));
    recordings_.push_back(std::make_unique<Recording>());
    active_[stream.index] = recordings_.back().get();
    recording_streams_.fetch_add(1);
    return absl::OkStatus();
  }
  absl::StatusOr<RecordingId> EndRecording(StreamId stream) override {
    MutexLock lock(&mutex_);
    Recording* const recording = active_[stream.index];
    if (recording == nullptr) {
      return absl::FailedPreconditionError("the stream is not recording");
    }
    active_[stream.index] = nullptr;
    recording_streams_.fetch_sub(1);
    cudaGraph_t captured = nullptr;
    HEADROOM_RETURN_IF_ERROR(NoteLocked(
        HEADROOM_CUDA_STATUS(cudaStreamEndCapture(streams_[stream.index].get(), &captured))));
    const CudaGraph graph(captured);
    cudaGraphExec_t exec = nullptr;
    HEADROOM_RETURN_IF_ERROR(
        NoteLocked(HEADROOM_CUDA_STATUS(cudaGraphInstantiate(&exec, graph.get(), 0))));
    recording->graph = CudaGraphExec(exec);
    HEADROOM_RETURN_IF_ERROR(NoteLocked(
        HEADROOM_CUDA_STATUS(cudaGraphUpload(exec, streams_[stream.index].get()))));
    for (size_t i = 0; i < recordings_.size(); ++i) {
      if (recordings_[i].get() == recording) return RecordingId{static_cast<int32_t>(i)};
    }
    return absl::InternalError("a recording is lost");
  }
  absl::Status Replay(StreamId stream, RecordingId id) override {
    if (active_[stream.index] != nullptr) {
      return absl::FailedPreconditionError("Replay while the stream is recording");
    }
    const Recording* recording;
    {
      MutexLock lock(&mutex_);
      if (id.index < 0 || static_cast<size_t>(id.index) >= recordings_.size()) {
        return absl::InternalError(absl::StrCat("Replay: there is no recording ", id.index));
      }
      recording = recordings_[id.index].get();
    }
    HEADROOM_RETURN_IF_ERROR(Enqueue(stream, "Replay", nullptr, 0, [&](cudaStream_t on) {
      return HEADROOM_CUDA_STATUS(cudaGraphLaunch(recording->graph.get(), on));
    }));
    for (const auto& [account, bytes] : recording->accounts) account->bytes += bytes;
    return absl::OkStatus();
  }

  absl::Status status() const override {
    if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
    MutexLock lock(&mutex_);
    return failure_;
  }

 private:
  struct Recording {
    CudaGraphExec graph;
    std::vector<int32_t> events;                           // recorded in it
    std::vector<std::pair<OpAccount*, int64_t>> accounts;  // what each replay adds
  };

  static absl::Status CheckNotCaptured(const Event& event) {
    if (!event.captured.load(std::memory_order_relaxed)) return absl::OkStatus();
    return absl::FailedPreconditionError(
        "an event whose latest record is part of a recording orders nothing outside of it");
  }

  // Streams do not wait for the legacy default stream, which other code of the process may use.
  static absl::StatusOr<CudaStream> NewStream() {
    cudaStream_t stream = nullptr;
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDA_STATUS(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
    return CudaStream(stream);
  }

  // To be awaited by AwaitSetup().
  absl::StatusOr<CudaMemory> Zeroed(size_t bytes) {
    void* data = nullptr;
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaMalloc(&data, bytes)));
    CudaMemory memory(data);
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDA_STATUS(cudaMemsetAsync(data, 0, bytes, setup_stream_.get())));
    return memory;
  }

  // A copy from plain memory may return before the GPU has it.
  absl::Status AwaitSetup() { return Await(setup_stream_); }
  absl::Status Await(const CudaStream& stream) {
    const cudaError_t state = PollUntil(absl::Now() + kSetupTimeout,
                                        [&] { return cudaStreamQuery(stream.get()); });
    if (state == cudaErrorNotReady) return absl::DeadlineExceededError("the GPU does not respond");
    return Note(CudaStatus(state, "cudaStreamQuery", __FILE__, __LINE__));
  }

  // Keeps the first failure.
  absl::Status Note(absl::Status status) {
    if (status.ok()) return status;
    MutexLock lock(&mutex_);
    return NoteLocked(std::move(status));
  }
  absl::Status NoteLocked(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (status.ok() || failed_.load(std::memory_order_relaxed)) return status;
    failure_ = status;
    failed_.store(true, std::memory_order_release);
    return status;
  }

  absl::Status CheckCopyOn(StreamId stream, const CopyArgs& args) const {
    const absl::Status status = CheckCopy(
        args, [&](const void* data, int64_t bytes) { return arena_.Contains(data, bytes); },
        [&](const void* data, int64_t bytes) { return host_.Contain(data, bytes); });
    // A capture would be broken off.
    if (status.ok() || active_[stream.index] == nullptr) return status;
    return absl::FailedPreconditionError(status.message());
  }

  // As CudaDeviceOptions::delay_seed wants it; no part of a recording.
  absl::Status DelayCopy(StreamId stream) {
    if (!delay_seed_.has_value() || active_[stream.index] != nullptr) return absl::OkStatus();
    const uint64_t draw = (*delay_seed_ + delays_.fetch_add(1)) * 0x9E3779B97F4A7C15u;
    const uint64_t us = (draw >> 32) % (kMostDelayUs + 1);
    const auto sleep = [](void* us) {
      absl::SleepFor(absl::Microseconds(reinterpret_cast<uintptr_t>(us)));
    };
    return Note(HEADROOM_CUDA_STATUS(cudaLaunchHostFunc(
        streams_[stream.index].get(), sleep, reinterpret_cast<void*>(static_cast<uintptr_t>(us)))));
  }

  // What blocks of one kernel tell each other by: one word for LaunchAttend(), the others for LaunchChain().
  uint32_t* Words(StreamId stream) const {
    return static_cast<uint32_t*>(words_.get()) + stream.index * kStreamWords;
  }

  static absl::Status StatusOf(cudaError_t error, absl::string_view op) {
    return CudaStatus(error, op, __FILE__, __LINE__);
  }
  static absl::Status StatusOf(const absl::Status& status, absl::string_view op) {
    return status.ok() ? status : Annotate(status, op);
  }

  template <typename F>
  absl::Status Enqueue(StreamId stream, const char* op, OpAccount* account, int64_t bytes,
                       F&& enqueue, int timed_of = 1) {
    const cudaStream_t on = streams_[stream.index].get();
    Recording* const recording = active_[stream.index];
    const bool timed = account != nullptr && account->ops.fetch_add(1) % timed_of == 0;
    OpTimers::Pair* const timer =
        recording == nullptr ? timers_.Begin(on, timed ? account : nullptr, op, bytes) : nullptr;
    absl::Status status = StatusOf(enqueue(on), op);
    timers_.End(on, timer);
    if (!status.ok()) return Note(std::move(status));
    if (account == nullptr || bytes == 0) return absl::OkStatus();
    if (recording != nullptr) {
      recording->accounts.emplace_back(account, bytes);
    } else {
      account->bytes += bytes;
    }
    return absl::OkStatus();
  }

  template <typename Args>
  absl::Status CheckArenaRanges(absl::string_view op, const Args& args, bool host_too = false) {
    return CheckRanges(op, args, [&](const void* data, int64_t bytes) {
      return arena_.Contains(data, bytes) || (host_too && host_.Contain(data, bytes));
    });
  }

  template <auto kLaunch, typename Args>
  absl::Status Launch(StreamId stream, const char* op, const Args& args,
                      OpAccount* account = nullptr, bool host_too = false) {
    return Launch(stream, op, args, account, host_too,
                  [&](cudaStream_t on) { return kLaunch(args, on); });
  }
  template <typename Args, typename F>
  absl::Status Launch(StreamId stream, const char* op, const Args& args, OpAccount* account,
                      bool host_too, F&& enqueue, int timed_of = 1) {
    HEADROOM_RETURN_IF_ERROR(CheckArenaRanges(op, args, host_too));
    int64_t bytes = 0;
    if constexpr (requires { KvBytesRead(args); }) {
      if (account != nullptr || TraceOn()) bytes = KvBytesRead(args);
    }
    return Enqueue(stream, op, account, bytes, enqueue, timed_of);
  }

  // ---- Constant after construction.
  const std::string name_;
  const std::optional<uint64_t> delay_seed_;
  const CudaMemory memory_;

  mutable Mutex mutex_;
  Arena arena_;  // its bounds are const; allocation under mutex_
  HostRegistrations host_;
  CudaMemory words_;  // kStreamWords of each stream
  OpTimers timers_;
  std::vector<std::unique_ptr<Recording>> recordings_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<WideGemm> wide_gemm_;  // null: kernels::cuda::LaunchGemm() takes all
  std::atomic<bool> failed_{false};
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);

  Mutex setup_mutex_;  // one preparation at a time
  CudaStream setup_stream_;
  Mutex upload_mutex_;  // one upload at a time, beside preparations
  CudaStream upload_stream_;

  mutable Mutex wide_mutex_;  // taken after setup_mutex_
  WideAttend wide_ ABSL_GUARDED_BY(wide_mutex_);

  // Each stream is fed by one thread at a time, which alone looks at its recording.
  CudaStream streams_[kMaxStreams];
  Recording* active_[kMaxStreams] = {};
  std::atomic<int> recording_streams_{0};
  std::atomic<uint64_t> delays_{0};  // of copies, so far
  int num_streams_ = 0;
  std::unique_ptr<Event[]> events_;
  int num_events_ = 0;
};

absl::Status Unavailable(const absl::Status& why) {
  return absl::UnavailableError(
      absl::StrCat("--device cuda: no NVIDIA driver or GPU that can be used: ", why.message()));
}

}  // namespace

absl::Status CheckCudaDriver() {
  int count = 0;
  const absl::Status found = HEADROOM_CUDA_STATUS(cudaGetDeviceCount(&count));
  return found.ok() ? found : Unavailable(found);
}

namespace {

// The card's name. UNAVAILABLE if it cannot run the kernels.
absl::StatusOr<std::string> FindCard() {
  HEADROOM_RETURN_IF_ERROR(CheckCudaDriver());
  cudaDeviceProp card;
  for (const absl::Status& step : {HEADROOM_CUDA_STATUS(cudaSetDevice(0)),
                                   HEADROOM_CUDA_STATUS(cudaGetDeviceProperties(&card, 0))}) {
    if (!step.ok()) return Unavailable(step);
  }
  if (card.major < 8) {
    return absl::UnavailableError(absl::StrCat("--device cuda: ", card.name,
                                               " has compute capability ", card.major, ".",
                                               card.minor, "; 8.0 or later is needed"));
  }
  int host_pointers = 0;
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaDeviceGetAttribute(
      &host_pointers, cudaDevAttrCanUseHostPointerForRegisteredMem, 0)));
  if (host_pointers == 0) {
    return absl::UnavailableError(absl::StrCat(
        "--device cuda: ", card.name, " cannot address registered host memory by its own address"));
  }
  return std::string(card.name);
}

// What kernels, events and the driver take beside the arena on a card that is asked for all it has.
constexpr int64_t kLeftFreeBytes = int64_t{1} << 30;

// `*bytes` of 0 becomes what is free less kLeftFreeBytes.
absl::StatusOr<CudaMemory> AllocateArena(int64_t* bytes, absl::string_view card) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaMemGetInfo(&free_bytes, &all_bytes)));
  if (*bytes == 0) *bytes = static_cast<int64_t>(free_bytes) - kLeftFreeBytes;
  if (*bytes <= 0) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "device memory: only ", free_bytes, " of ", all_bytes, " bytes are free on ", card));
  }
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(*bytes));
  if (error == cudaSuccess) return CudaMemory(memory);
  return Annotate(CudaStatus(error, "cudaMalloc", __FILE__, __LINE__),
                  absl::StrCat("device memory: ", *bytes, " bytes asked for, ", free_bytes, " of ",
                               all_bytes, " free on ", card));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice(const CudaDeviceOptions& options) {
  HEADROOM_ASSIGN_OR_RETURN(const std::string card, FindCard());
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(kernels::cuda::LoadKernels()));
  int64_t arena_bytes = options.arena_bytes;
  HEADROOM_ASSIGN_OR_RETURN(CudaMemory memory, AllocateArena(&arena_bytes, card));
  auto device =
      std::make_unique<CudaDevice>(card, std::move(memory), arena_bytes, options.delay_seed);
  HEADROOM_RETURN_IF_ERROR(device->Init());
  return device;
}

}  // namespace headroom
