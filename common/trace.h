// A trace of what runs when, for Perfetto (ui.perfetto.dev) or chrome://tracing.
//
// Off by default: one relaxed load an event. When on, events go into a bounded buffer that a thread of
// its own writes to the file four times a second; what does not fit is counted and left out. Several
// processes may append to one file: their clocks are one (CLOCK_MONOTONIC).
#ifndef HEADROOM_COMMON_TRACE_H_
#define HEADROOM_COMMON_TRACE_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/steady_time.h"

namespace headroom {

namespace trace_internal {
extern std::atomic<bool> on;
}

inline bool TraceOn() { return trace_internal::on.load(std::memory_order_relaxed); }

// Whether StartTrace() would get its file, and the error if not, which names --trace. Makes nothing.
absl::Status CheckTrace(const std::string& path);

// Begins to append to `path`, which is made if it is not there. Before anything is traced; not while
// a trace is being written.
absl::Status StartTrace(const std::string& path, const std::string& process);
// Writes what there is and closes the file.
void StopTrace();

// Something that took from `begin_ns` to `end_ns` (SteadyNs()) on the calling thread. `name` and
// `arg_name` are literals; arg_name null: no argument. Thread-safe, allocates nothing.
void TraceSlice(const char* name, int64_t begin_ns, int64_t end_ns, const char* arg_name = nullptr,
                int64_t arg = 0);
// A row of this process that is none of its threads: a stream of a GPU. `name` is plain text without
// quotes; two rows may have the same. Thread-safe; allocates, to be called at start, traced or not.
enum class TraceTrack : int32_t {};
TraceTrack MakeTraceTrack(absl::string_view name);
// TraceSlice() on that row. Who draws slices that overlap there has them shown as one in the other.
void TraceSliceOn(TraceTrack track, const char* name, int64_t begin_ns, int64_t end_ns,
                  const char* arg_name = nullptr, int64_t arg = 0);
// Something that happened on the calling thread.
void TraceInstant(const char* name, const char* arg_name = nullptr, int64_t arg = 0);

// The block it is in, as a slice.
class TraceScope {
 public:
  explicit TraceScope(const char* name, const char* arg_name = nullptr, int64_t arg = 0)
      : name_(name), arg_name_(arg_name), arg_(arg), begin_ns_(TraceOn() ? SteadyNs() : 0) {}
  ~TraceScope() {
    if (begin_ns_ != 0) TraceSlice(name_, begin_ns_, SteadyNs(), arg_name_, arg_);
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  const char* const name_;
  const char* const arg_name_;
  const int64_t arg_;
  const int64_t begin_ns_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TRACE_H_
