#include "common/device/cpu/cpu_device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/checked_math.h"
#include "common/device/arena.h"
#include "common/device/cpu/cpu_stream.h"
#include "common/device/cpu/streaming_copy.h"
#include "common/device/kv_bytes.h"
#include "common/device/launch_check.h"
#include "common/device/touch_ranges.h"
#include "common/futex.h"
#include "common/mutex.h"
#include "common/segment/mailbox.h"
#include "common/status.h"
#include "kernels/cpu/kernel_table.h"

namespace headroom {
namespace {

using kernels::Access;

constexpr int kMaxStreams = 16;
constexpr int kMaxEvents = 4096;

// Counts of Record() and of records that have run; a stream waits for the count it saw.
struct Event {
  std::atomic<uint32_t> recorded{0};
  std::atomic<uint32_t> fired{0};
  std::atomic<int32_t> stream{-1};
  // Its latest record was made in a recording: it orders nothing outside.
  std::atomic<bool> captured{false};
};

void AwaitFired(const Event& event, uint32_t target) {
  for (;;) {
    const uint32_t fired = event.fired.load(std::memory_order_acquire);
    if (static_cast<int32_t>(fired - target) >= 0) return;
    FutexWait(event.fired, fired, absl::Seconds(1));
  }
}

struct RecordEventArgs {
  Event* event;
  uint32_t value;
};
struct WaitEventArgs {
  const Event* event;
  uint32_t target;
};
struct ReplayArgs {
  const std::vector<CpuOp>* ops;
};

void RunCopy(const CopyArgs& a) {
  if (a.width_bytes == a.src_pitch_bytes && a.width_bytes == a.dst_pitch_bytes) {
    StreamingCopy(a.dst, a.src, a.width_bytes * a.height);
    return;
  }
  for (int64_t row = 0; row < a.height; ++row) {
    StreamingCopy(static_cast<uint8_t*>(a.dst) + row * a.dst_pitch_bytes,
                  static_cast<const uint8_t*>(a.src) + row * a.src_pitch_bytes, a.width_bytes);
  }
}

void RunPost(const kernels::PostQueriesArgs& a) {
  if (a.mailbox->retired.load(std::memory_order_acquire) != 0) return;
  for (int64_t row = 0; row < a.rows; ++row) {
    std::memcpy(a.queries + row * a.row_floats, a.q + row * a.q_stride,
                static_cast<size_t>(a.row_floats) * sizeof(float));
  }
  a.slot->post = a.post;
  RingPosted(*a.mailbox, *a.slot, a.count);
}

void RunAwait(const kernels::AwaitPartialsArgs& a) {
  using kernels::AwaitResult;
  const auto give_up = [&a](AwaitResult why) {
    uint32_t ok = kernels::kAwaitOk;
    a.status->compare_exchange_strong(ok, why);
    a.mailbox->retired.store(1);
  };
  const bool answered = AwaitAnswered(*a.mailbox, *a.slot, a.count,
                                      absl::Microseconds(a.deadline_us));
  // Retired by an earlier wait: even what has come since is not taken.
  if (a.mailbox->retired.load() != 0) return give_up(kernels::kAwaitRetired);
  if (!answered) return give_up(kernels::kAwaitExpired);
  const AwaitResult result = kernels::JudgeAnswer(a, a.slot->answer);
  if (result != kernels::kAwaitOk) give_up(result);
}

class CpuDevice : public Device {
 public:
  CpuDevice(uint8_t* memory, const CpuDeviceOptions& options)
      : options_(options), arena_(memory, options.arena_bytes), events_(new Event[kMaxEvents]) {}

  ~CpuDevice() override {
    for (auto& stream : streams_) stream.reset();
    munmap(arena_.base(), static_cast<size_t>(arena_.capacity_bytes()));
  }

  absl::string_view name() const override { return "cpu"; }

  absl::StatusOr<uint8_t*> Allocate(int64_t bytes, absl::string_view what) override {
    MutexLock lock(&mutex_);
    return arena_.Allocate(bytes, what);
  }
  ArenaUse arena_use() const override {
    MutexLock lock(&mutex_);
    return {arena_.capacity_bytes(), arena_.used_bytes(), arena_.used_bytes()};
  }

  absl::Status RegisterHost(void* data, int64_t bytes) override {
    auto* const begin = static_cast<uint8_t*>(data);
    if (begin == nullptr || bytes <= 0) {
      return absl::InvalidArgumentError(absl::StrCat("a host range of ", bytes, " bytes"));
    }
    MutexLock lock(&mutex_);
    for (const auto& range : host_ranges_) {
      if (begin < range.base() + range.capacity_bytes() && range.base() < begin + bytes) {
        return absl::AlreadyExistsError("host range registered twice");
      }
    }
    host_ranges_.emplace_back(begin, bytes);
    return absl::OkStatus();
  }
  absl::Status UnregisterHost(void* data) override {
    MutexLock lock(&mutex_);
    const auto at = std::find_if(host_ranges_.begin(), host_ranges_.end(),
                                 [&](const Arena& range) { return range.base() == data; });
    if (at == host_ranges_.end()) return absl::NotFoundError("host range is not registered");
    host_ranges_.erase(at);
    return absl::OkStatus();
  }

  kernels::ElementType product_type() const override { return kernels::ElementType::kFloat32; }
  absl::Status PrepareGemm(int64_t, int64_t) override { return absl::OkStatus(); }
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
    kernels::cpu::PackWeightRows(rows_data, row_begin, rows, n, k,
                                 reinterpret_cast<kernels::BFloat16*>(packed));
    return absl::OkStatus();
  }
  absl::Status FillRandom(const kernels::FillRandomArgs& args) override {
    if (!arena_.Contains(args.out, PackedBytes(args.n, args.k))) {
      return ForeignAddressError("FillRandom", args.out);
    }
    kernels::CpuTeam team(options_.compute_threads);
    kernels::cpu::FillRandom(args, team);
    return absl::OkStatus();
  }
  absl::Status Upload(uint8_t* dst, const void* src, int64_t bytes) override {
    if (!arena_.Contains(dst, bytes)) return ForeignAddressError("Upload", dst);
    std::memcpy(dst, src, static_cast<size_t>(bytes));
    return absl::OkStatus();
  }

  absl::StatusOr<StreamId> CreateStream(absl::string_view name) override {
    MutexLock lock(&mutex_);
    const int index = num_streams_;
    if (index == kMaxStreams) return absl::ResourceExhaustedError("too many streams");
    std::optional<uint64_t> seed = options_.delay_seed;
    if (seed.has_value()) *seed = *seed * 1000003 + static_cast<uint64_t>(index);
    streams_[index] = std::make_unique<CpuStream>(
        std::string(name), name == "compute" ? options_.compute_threads : 1, seed);
    ++num_streams_;
    return StreamId{index};
  }
  absl::StatusOr<EventId> CreateEvent() override {
    MutexLock lock(&mutex_);
    if (num_events_ == kMaxEvents) return absl::ResourceExhaustedError("too many events");
    return EventId{num_events_++};
  }

  absl::Status Record(StreamId stream, EventId id) override {
    Event& event = events_[id.index];
    if (Recording* recording = recording_of(stream)) {
      // It orders the recording's own operations, which run in order anyway.
      recording->recorded.push_back(id.index);
      event.captured.store(true, std::memory_order_relaxed);
      return absl::OkStatus();
    }
    int32_t owner = -1;
    if (!event.stream.compare_exchange_strong(owner, stream.index) && owner != stream.index) {
      return absl::InternalError("an event is recorded on two streams");
    }
    event.captured.store(false, std::memory_order_relaxed);
    const uint32_t value = event.recorded.fetch_add(1, std::memory_order_relaxed) + 1;
    return Enqueue(stream, nullptr, RecordEventArgs{&event, value}, nullptr,
                   [](const void* args, kernels::CpuTeam&, OpAccount*) {
                     const auto& a = *static_cast<const RecordEventArgs*>(args);
                     a.event->fired.store(a.value, std::memory_order_release);
                     FutexWakeAll(a.event->fired);
                   });
  }

  absl::Status Wait(StreamId stream, EventId id, OpAccount* account) override {
    Event& event = events_[id.index];
    if (const Recording* recording = recording_of(stream)) {
      if (std::find(recording->recorded.begin(), recording->recorded.end(), id.index) ==
          recording->recorded.end()) {
        return absl::FailedPreconditionError("a recording waits for an event outside of it");
      }
      return absl::OkStatus();  // recorded on the same stream: in order already
    }
    HEADROOM_RETURN_IF_ERROR(CheckNotCaptured(event));
    const uint32_t target = event.recorded.load(std::memory_order_relaxed);
    if (target == 0) return absl::OkStatus();
    return Enqueue(stream, "Wait", WaitEventArgs{&event, target}, account,
                   [](const void* args, kernels::CpuTeam&, OpAccount*) {
                     const auto& a = *static_cast<const WaitEventArgs*>(args);
                     AwaitFired(*a.event, a.target);
                   });
  }

  absl::Status Synchronize(EventId id, absl::Duration timeout) override {
    if (recording_streams_.load() != 0) {
      return absl::FailedPreconditionError("Synchronize while a stream is recording");
    }
    const Event& event = events_[id.index];
    HEADROOM_RETURN_IF_ERROR(CheckNotCaptured(event));
    const uint32_t target = event.recorded.load(std::memory_order_relaxed);
    const absl::Time deadline = absl::Now() + timeout;
    for (;;) {
      const uint32_t fired = event.fired.load(std::memory_order_acquire);
      if (static_cast<int32_t>(fired - target) >= 0) return absl::OkStatus();
      const absl::Duration left = deadline - absl::Now();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(
            absl::StrCat("the device has not ended its work within ", absl::FormatDuration(timeout)));
      }
      FutexWait(event.fired, fired, std::min(left, absl::Seconds(1)));
    }
  }
  bool Done(EventId id) override {
    const Event& event = events_[id.index];
    return static_cast<int32_t>(event.fired.load(std::memory_order_acquire) -
                                event.recorded.load(std::memory_order_relaxed)) >= 0;
  }

  absl::Status Copy(StreamId stream, const CopyArgs& args, OpAccount* account) override {
    absl::Status status = CheckCopy(
        args, [this](const void* data, int64_t bytes) { return arena_.Contains(data, bytes); },
        [this](const void* data, int64_t bytes) { return InHost(data, bytes); });
    if (!status.ok() && recording_of(stream) != nullptr) {
      status = absl::FailedPreconditionError(status.message());
    }
    HEADROOM_RETURN_IF_ERROR(status);
    return Enqueue(stream, "Copy", args, account,
                   [](const void* a, kernels::CpuTeam&, OpAccount* account) {
                     const auto& args = *static_cast<const CopyArgs*>(a);
                     TouchRanges(args);
                     RunCopy(args);
                     if (account != nullptr) account->bytes += args.width_bytes * args.height;
                   });
  }

  absl::Status PostQueries(StreamId stream, const kernels::PostQueriesArgs& args) override {
    HEADROOM_RETURN_IF_ERROR(CheckPost(
        args, [this](const void* data, int64_t bytes) { return arena_.Contains(data, bytes); },
        [this](const void* data, int64_t bytes) { return InHost(data, bytes); }));
    return Enqueue(stream, "PostQueries", args, nullptr,
                   [](const void* a, kernels::CpuTeam&, OpAccount*) {
                     RunPost(*static_cast<const kernels::PostQueriesArgs*>(a));
                   });
  }
  absl::Status AwaitPartials(StreamId stream, const kernels::AwaitPartialsArgs& args,
                             OpAccount* account) override {
    HEADROOM_RETURN_IF_ERROR(CheckAwait(
        args, [this](const void* data, int64_t bytes) { return InHost(data, bytes); }));
    return Enqueue(stream, "AwaitPartials", args, account,
                   [](const void* a, kernels::CpuTeam&, OpAccount*) {
                     RunAwait(*static_cast<const kernels::AwaitPartialsArgs*>(a));
                   });
  }
  absl::Status MergePartials(StreamId s, const kernels::MergePartialsArgs& a) override {
    HEADROOM_RETURN_IF_ERROR(CheckFloats("MergePartials", {a.out}));
    return Launch<&kernels::cpu::MergePartials>(s, "MergePartials", a, nullptr, /*host_too=*/true);
  }
  absl::Status Embed(StreamId s, const kernels::EmbedArgs& a) override {
    return Launch<&kernels::cpu::Embed>(s, "Embed", a);
  }
  absl::Status RmsNorm(StreamId s, const kernels::RmsNormArgs& a) override {
    HEADROOM_RETURN_IF_ERROR(CheckFloats("RmsNorm", {a.out}));
    return Launch<&kernels::cpu::RmsNorm>(s, "RmsNorm", a);
  }
  absl::Status Gemm(StreamId s, const kernels::GemmArgs& a) override {
    HEADROOM_RETURN_IF_ERROR(CheckFloats("Gemm", {a.a, a.c}));
    return Launch<&kernels::cpu::Gemm>(s, "Gemm", a);
  }
  absl::Status SwiGlu(StreamId s, const kernels::SwiGluArgs& a) override {
    HEADROOM_RETURN_IF_ERROR(CheckFloats("SwiGlu", {a.gate_up, a.out}));
    return Launch<&kernels::cpu::SwiGlu>(s, "SwiGlu", a);
  }
  absl::Status RopeTable(StreamId s, const kernels::RopeTableArgs& a) override {
    return Launch<&kernels::cpu::RopeTable>(s, "RopeTable", a);
  }
  absl::Status RopeAppend(StreamId s, const kernels::RopeAppendArgs& a) override {
    return Launch<&kernels::cpu::RopeAppend>(s, "RopeAppend", a);
  }
  absl::Status Attend(StreamId s, const kernels::AttendArgs& a, OpAccount* account) override {
    HEADROOM_RETURN_IF_ERROR(CheckFloats("Attend", {a.out}));
    return Launch<&kernels::cpu::Attend>(s, "Attend", a, account);
  }
  absl::Status CopyKvRows(StreamId s, const kernels::CopyKvRowsArgs& a,
                          OpAccount* account) override {
    return Launch<&kernels::cpu::CopyKvRows>(s, "CopyKvRows", a, account, /*host_too=*/true);
  }
  absl::Status SoftCap(StreamId s, const kernels::SoftCapArgs& a) override {
    return Launch<&kernels::cpu::SoftCap>(s, "SoftCap", a);
  }
  absl::Status Sample(StreamId s, const kernels::SampleArgs& a) override {
    return Launch<&kernels::cpu::Sample>(s, "Sample", a);
  }

  absl::Status BeginRecording(StreamId stream) override {
    MutexLock lock(&mutex_);
    if (active_[stream.index] != nullptr) {
      return absl::FailedPreconditionError("the stream is recording already");
    }
    recordings_.push_back(std::make_unique<Recording>());
    active_[stream.index] = recordings_.back().get();
    recording_streams_.fetch_add(1);
    return absl::OkStatus();
  }
  absl::StatusOr<RecordingId> EndRecording(StreamId stream) override {
    MutexLock lock(&mutex_);
    if (active_[stream.index] == nullptr) {
      return absl::FailedPreconditionError("the stream is not recording");
    }
    for (size_t i = 0; i < recordings_.size(); ++i) {
      if (recordings_[i].get() != active_[stream.index]) continue;
      active_[stream.index] = nullptr;
      recording_streams_.fetch_sub(1);
      return RecordingId{static_cast<int32_t>(i)};
    }
    return absl::InternalError("a recording is lost");
  }
  absl::Status Replay(StreamId stream, RecordingId id) override {
    if (recording_of(stream) != nullptr) {
      return absl::FailedPreconditionError("Replay while the stream is recording");
    }
    const std::vector<CpuOp>* ops;
    {
      MutexLock lock(&mutex_);
      if (id.index < 0 || static_cast<size_t>(id.index) >= recordings_.size()) {
        return absl::InternalError(absl::StrCat("Replay: there is no recording ", id.index));
      }
      ops = &recordings_[id.index]->ops;
    }
    return Enqueue(stream, "Replay", ReplayArgs{ops}, nullptr,
                   [](const void* args, kernels::CpuTeam& team, OpAccount*) {
                     for (const CpuOp& op : *static_cast<const ReplayArgs*>(args)->ops) {
                       RunOp(op, team);
                     }
                   });
  }

  // Nothing on this device fails after its launch has been checked, unless a test asks for it.
  absl::Status status() const override {
    if (options_.fail_file.empty()) return absl::OkStatus();
    if (!lost_ && access(options_.fail_file.c_str(), F_OK) == 0) lost_ = true;
    if (!lost_) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("there is ", options_.fail_file));
  }

 private:
  struct Recording {
    std::vector<CpuOp> ops;
    std::vector<int32_t> recorded;  // events
  };

  static absl::Status CheckNotCaptured(const Event& event) {
    if (!event.captured.load(std::memory_order_relaxed)) return absl::OkStatus();
    return absl::FailedPreconditionError(
        "an event whose latest record is part of a recording orders nothing outside of it");
  }

  bool InHost(const void* data, int64_t bytes) const {
    MutexLock lock(&mutex_);
    return std::any_of(host_ranges_.begin(), host_ranges_.end(),
                       [&](const Arena& range) { return range.Contains(data, bytes); });
  }

  Recording* recording_of(StreamId stream) { return active_[stream.index]; }

  template <typename Args>
  absl::Status Enqueue(StreamId stream, const char* name, const Args& args, OpAccount* account,
                       CpuOp::Run run) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= CpuOp::kStorageBytes);
    CpuOp op;
    op.run = run;
    op.name = name;
    op.account = account;
    new (op.storage) Args(args);
    if (Recording* recording = recording_of(stream)) {
      recording->ops.push_back(op);
      return absl::OkStatus();
    }
    return streams_[stream.index]->Push(op);
  }

  static absl::Status CheckFloats(absl::string_view op,
                                  std::initializer_list<kernels::Activations> all) {
    for (const kernels::Activations& one : all) {
      if (one.type == kernels::ElementType::kFloat32) continue;
      return absl::InternalError(absl::StrCat(op, ": activations of the CPU device are float32"));
    }
    return absl::OkStatus();
  }

  template <auto kKernel, typename Args>
  absl::Status Launch(StreamId stream, const char* name, const Args& args,
                      OpAccount* account = nullptr, bool host_too = false) {
    HEADROOM_RETURN_IF_ERROR(CheckRanges(name, args, [&](const void* data, int64_t bytes) {
      return arena_.Contains(data, bytes) || (host_too && InHost(data, bytes));
    }));
    return Enqueue(stream, name, args, account,
                   [](const void* a, kernels::CpuTeam& team, OpAccount* account) {
                     const auto& args = *static_cast<const Args*>(a);
                     TouchRanges(args);
                     kKernel(args, team);
                     if constexpr (requires { KvBytesRead(args); }) {
                       if (account != nullptr) account->bytes += KvBytesRead(args);
                     }
                   });
  }

  const CpuDeviceOptions options_;
  mutable std::atomic<bool> lost_{false};

  mutable Mutex mutex_;
  Arena arena_;                     // its bounds are const; allocation under mutex_
  std::vector<Arena> host_ranges_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Recording>> recordings_ ABSL_GUARDED_BY(mutex_);

  // Each stream is fed by one thread at a time, which alone looks at its recording.
  std::unique_ptr<CpuStream> streams_[kMaxStreams];
  Recording* active_[kMaxStreams] = {};
  std::atomic<int> recording_streams_{0};
  int num_streams_ = 0;
  std::unique_ptr<Event[]> events_;
  int num_events_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateCpuDevice(const CpuDeviceOptions& options) {
  if (!kernels::cpu::HasAvx2()) {
    return absl::UnimplementedError("the CPU device needs a processor with AVX2 and FMA");
  }
  void* const memory = mmap(nullptr, static_cast<size_t>(options.arena_bytes),
                            PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("an arena of ", options.arena_bytes,
                                                     " bytes: ", std::strerror(errno)));
  }
  // Large pages halve the TLB misses of streaming the weights; where they are not to be had, 4 KiB
  // pages do.
  madvise(memory, static_cast<size_t>(options.arena_bytes), MADV_HUGEPAGE);
  return std::unique_ptr<Device>(
      std::make_unique<CpuDevice>(static_cast<uint8_t*>(memory), options));
}

}  // namespace headroom
