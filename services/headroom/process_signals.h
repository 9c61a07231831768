// Signals of this process, read from a descriptor instead of taken by a handler.
#ifndef HEADROOM_SERVICES_HEADROOM_PROCESS_SIGNALS_H_
#define HEADROOM_SERVICES_HEADROOM_PROCESS_SIGNALS_H_

#include <functional>
#include <initializer_list>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/fd.h"

namespace headroom::cli {

// Who stops a process may signal it and its group (timeout does, and so do terminals through a
// wrapper): what comes so soon after a signal is the same one.
inline constexpr absl::Duration kSameSignal = absl::Milliseconds(300);

// Made on the main thread before any other starts: threads inherit that the signals are blocked.
// They stay blocked until the process ends.
class ProcessSignals {
 public:
  static absl::StatusOr<ProcessSignals> Block(std::initializer_list<int> signals);

  // Readable when a signal has come.
  int fd() const { return fd_.get(); }
  // The next signal that has come, or 0.
  int Take();

 private:
  explicit ProcessSignals(Fd fd) : fd_(std::move(fd)) {}

  Fd fd_;
};

// A thread that hands each signal to `on_signal` (of those within kSameSignal the first), until it
// is destroyed.
class SignalThread {
 public:
  SignalThread(ProcessSignals signals, std::function<void(int)> on_signal);
  ~SignalThread();

 private:
  void Loop();

  ProcessSignals signals_;
  const std::function<void(int)> on_signal_;
  Fd stop_;  // an eventfd
  std::thread thread_;
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_PROCESS_SIGNALS_H_
