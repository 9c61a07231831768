// What the worker needs of a device: one arena, streams, events, copies, operations, record and
// replay. The worker is written once against this class; CpuDevice and CudaDevice implement it.
//
// Model. A device owns one arena of a fixed size, carved at start; nothing is allocated afterwards.
// Work is enqueued on streams: operations of one stream run in order, streams run side by side, and
// only events order them. Enqueuing is asynchronous and does not allocate. All pointers handed to an
// operation must lie in the arena, or, where a copy or CopyKvRows names host memory, in a range
// registered with RegisterHost(): this is checked at launch, INTERNAL names operation and pointer.
//
// Threads. A stream is fed by one thread at a time. Different streams may be fed by different
// threads. Everything else may be called from any thread.
//
// Failure. An operation that fails (a deadline in AwaitPartials, a lost device) sets the status word
// that it was given or the device's sticky status(); later work still drains, so that a stream never
// hangs.
#ifndef HEADROOM_COMMON_DEVICE_DEVICE_H_
#define HEADROOM_COMMON_DEVICE_DEVICE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "kernels/chain.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/embed.h"
#include "kernels/fill_random.h"
#include "kernels/gemm.h"
#include "kernels/mailbox.h"
#include "kernels/merge_partials.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/soft_cap.h"
#include "kernels/swiglu.h"

namespace headroom {

// Names a stream or an event of one device; cheap to copy, valid as long as the device.
struct StreamId {
  int32_t index = -1;
};
struct EventId {
  int32_t index = -1;
};
struct RecordingId {
  int32_t index = -1;
};

// What an operation moved and how long it took, added where it runs. Host memory, owned by the
// caller, alive until the operation has run.
struct OpAccount {
  std::atomic<int64_t> bytes{0};
  std::atomic<int64_t> busy_ns{0};  // of the operations that were timed
  // A GPU times some only (kTimedOf in cuda_device.cc): events between two kernels keep them from overlapping.
  std::atomic<int32_t> ops{0};
  std::atomic<int32_t> timed_ops{0};

  // The time of all, those that were not timed taken for as long as the others.
  int64_t EstimatedBusyNs() const {
    const int32_t timed = timed_ops;
    return timed > 0 && timed < ops ? busy_ns * ops / timed : busy_ns.load();
  }
  void Clear() { bytes = busy_ns = ops = timed_ops = 0; }
};

// Rows of a rectangle: `height` rows of `width_bytes`. A plain copy has height 1.
struct CopyArgs {
  void* dst = nullptr;
  int64_t dst_pitch_bytes = 0;
  const void* src = nullptr;
  int64_t src_pitch_bytes = 0;
  int64_t width_bytes = 0;
  int64_t height = 1;
};

template <typename F>
void ForEachRange(const CopyArgs& a, F&& f) {
  for (int64_t row = 0; row < a.height; ++row) {
    f(static_cast<const uint8_t*>(a.src) + row * a.src_pitch_bytes, a.width_bytes, kernels::Access::kRead);
    f(static_cast<uint8_t*>(a.dst) + row * a.dst_pitch_bytes, a.width_bytes, kernels::Access::kWrite);
  }
}

// What became of items of many rows (kernels/wide_shape.h).
struct WideAttendUse {
  int64_t plans_built = 0;
  int64_t calls = 0;  // of plans, by Attend
};

// Bytes of the arena by what they are used for, shown in status and --explain.
struct ArenaUse {
  int64_t capacity_bytes = 0;
  int64_t used_bytes = 0;
  int64_t high_water_bytes = 0;
  int64_t free_bytes() const { return capacity_bytes - used_bytes; }
};

class Device {
 public:
  virtual ~Device() = default;

  virtual absl::string_view name() const = 0;  // "cpu", or the card's name

  // ---- Arena. Start-up only.
  // A zeroed range, aligned to 256 bytes, alive as long as the device. RESOURCE_EXHAUSTED names
  // `what`, the bytes asked for and the bytes left.
  virtual absl::StatusOr<uint8_t*> Allocate(int64_t bytes, absl::string_view what) = 0;
  virtual ArenaUse arena_use() const = 0;

  // ---- Host memory that operations may name: mapped segments, staging buffers.
  // A range may be registered once; unregister only when no operation uses it.
  virtual absl::Status RegisterHost(void* data, int64_t bytes) = 0;
  virtual absl::Status UnregisterHost(void* data) = 0;

  // What goes into this device's matrix products and comes from them (GemmArgs, and what feeds it).
  virtual kernels::ElementType product_type() const = 0;

  // ---- Weights. Synchronous, start-up only.
  // Writes rows [row_begin, row_begin + rows) of a row-major bfloat16 [n, k] matrix (plain host
  // memory) into `packed` in the form that this device's Gemm and Embed read.
  virtual int64_t PackedBytes(int64_t n, int64_t k) const = 0;
  virtual absl::Status LoadWeightRows(const kernels::BFloat16* rows_data, int64_t row_begin,
                                      int64_t rows, int64_t n, int64_t k, uint8_t* packed) = 0;
  // Makes what products with an [n, k] matrix need, so that none is made while steps run.
  virtual absl::Status PrepareGemm(int64_t n, int64_t k) = 0;
  // Draws a packed weight (kernels/fill_random.h) where it lies.
  virtual absl::Status FillRandom(const kernels::FillRandomArgs& args) = 0;
  // Copies plain host memory into the arena, now.
  virtual absl::Status Upload(uint8_t* dst, const void* src, int64_t bytes) = 0;

  // ---- Streams and events. Made at start.
  virtual absl::StatusOr<StreamId> CreateStream(absl::string_view name) = 0;
  virtual absl::StatusOr<EventId> CreateEvent() = 0;
  // The event fires when everything enqueued on `stream` so far has run. Recording again, always on
  // the same stream, moves it.
  virtual absl::Status Record(StreamId stream, EventId event) = 0;
  // Later work of `stream` runs after the latest Record() of `event` before this call. An event that
  // was never recorded does not block. `account`, if given, receives the time that the stream waited.
  virtual absl::Status Wait(StreamId stream, EventId event, OpAccount* account = nullptr) = 0;
  // Blocks the calling host thread until the event's latest record has fired. DEADLINE_EXCEEDED.
  virtual absl::Status Synchronize(EventId event, absl::Duration timeout) = 0;
  // Whether the event's latest record has fired.
  virtual bool Done(EventId event) = 0;

  // ---- Copies: at least one side in the arena, the other too or registered host memory.
  virtual absl::Status Copy(StreamId stream, const CopyArgs& args, OpAccount* account = nullptr) = 0;
  // Several, in no order among themselves: a GPU's copy engine then makes no pause between them.
  virtual absl::Status CopyEach(StreamId stream, absl::Span<const CopyArgs> copies,
                                OpAccount* account = nullptr) {
    for (const CopyArgs& copy : copies) {
      if (absl::Status status = Copy(stream, copy, account); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // ---- The mailbox (kernels/mailbox.h); its memory is registered. `account`, if given, receives the
  // time that the stream waited. The merge reads the partials where they lie.
  virtual absl::Status PostQueries(StreamId stream, const kernels::PostQueriesArgs& args) = 0;
  virtual absl::Status AwaitPartials(StreamId stream, const kernels::AwaitPartialsArgs& args,
                                     OpAccount* account = nullptr) = 0;
  virtual absl::Status MergePartials(StreamId stream, const kernels::MergePartialsArgs& args) = 0;

  // ---- Operations; kernels/*.h say what each computes. `account`, if given, receives the time and,
  // for Attend and CopyKvRows, the bytes of keys and values that were read.
  virtual absl::Status Embed(StreamId stream, const kernels::EmbedArgs& args) = 0;
  virtual absl::Status RmsNorm(StreamId stream, const kernels::RmsNormArgs& args) = 0;
  virtual absl::Status Gemm(StreamId stream, const kernels::GemmArgs& args) = 0;
  virtual absl::Status SwiGlu(StreamId stream, const kernels::SwiGluArgs& args) = 0;
  // Gemm and SwiGlu, as one operation where the device has it.
  virtual absl::Status GatedGemm(StreamId stream, const kernels::GatedGemmArgs& args) {
    if (absl::Status status = Gemm(stream, args.gemm); !status.ok()) return status;
    return SwiGlu(stream, args.swiglu);
  }
  virtual absl::Status RopeTable(StreamId stream, const kernels::RopeTableArgs& args) = 0;
  virtual absl::Status RopeAppend(StreamId stream, const kernels::RopeAppendArgs& args) = 0;
  // One after the other (kernels/chain.h), as fewer operations where the device can.
  virtual absl::Status Chain(StreamId stream, absl::Span<const kernels::ChainOp> ops) {
    for (const kernels::ChainOp& op : ops) {
      if (absl::Status status = RunAlone(stream, op); !status.ok()) return status;
    }
    return absl::OkStatus();
  }
  virtual absl::Status Attend(StreamId stream, const kernels::AttendArgs& args,
                              OpAccount* account = nullptr) = 0;
  // Start-up only: plans what Attend needs to take the faster way for items of many rows of such
  // heads, and runs each plan once in `scratch`, of which Attend will get as much. UNAVAILABLE says
  // why there is no such way; Attend then computes all items alike.
  virtual absl::Status PrepareWideAttend(const kernels::WideShape&, float* /*scratch*/,
                                         int64_t /*scratch_floats*/) {
    return absl::UnavailableError("this device computes all items alike");
  }
  virtual WideAttendUse wide_attend_use() const { return {}; }
  // Plans that libraries made so far, for products and for attention. Start-up makes all: one that is
  // made while steps run stalls them, by up to a second.
  virtual int64_t plans_built() const { return 0; }
  virtual absl::Status CopyKvRows(StreamId stream, const kernels::CopyKvRowsArgs& args,
                                  OpAccount* account = nullptr) = 0;
  virtual absl::Status SoftCap(StreamId stream, const kernels::SoftCapArgs& args) = 0;
  virtual absl::Status Sample(StreamId stream, const kernels::SampleArgs& args) = 0;

  // ---- Record and replay (on CUDA a graph). Between BeginRecording and EndRecording operations of
  // `stream` are recorded and not run. Refused with FAILED_PRECONDITION, as CUDA's capture would:
  // recording twice, replaying, Synchronize() of anything, waits for events recorded outside the
  // recording, and outside for events last recorded inside, copies from host memory that is not
  // registered.
  virtual absl::Status BeginRecording(StreamId stream) = 0;
  virtual absl::StatusOr<RecordingId> EndRecording(StreamId stream) = 0;
  virtual absl::Status Replay(StreamId stream, RecordingId recording) = 0;

  // OK while the device works; the first failure of any operation otherwise.
  virtual absl::Status status() const = 0;

 protected:
  absl::Status RunAlone(StreamId stream, const kernels::ChainOp& op) {
    struct {
      absl::Status operator()(const kernels::RmsNormArgs& a) { return device.RmsNorm(stream, a); }
      absl::Status operator()(const kernels::GemmArgs& a) { return device.Gemm(stream, a); }
      absl::Status operator()(const kernels::GatedGemmArgs& a) { return device.GatedGemm(stream, a); }
      absl::Status operator()(const kernels::RopeAppendArgs& a) { return device.RopeAppend(stream, a); }
      Device& device;
      StreamId stream;
    } run{*this, stream};
    return std::visit(run, op);
  }
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_DEVICE_H_
