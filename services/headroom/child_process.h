// A process started from this one.
#ifndef HEADROOM_SERVICES_HEADROOM_CHILD_PROCESS_H_
#define HEADROOM_SERVICES_HEADROOM_CHILD_PROCESS_H_

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/fd.h"

namespace headroom::cli {

// How a process ended.
struct ExitStatus {
  bool by_signal = false;
  int code = 0;  // exit code, or the signal

  // "exited with code 1", "was killed by signal 9 (Killed)".
  std::string ToString() const;
};

// Move-only. Destroyed while it runs, it is killed and waited for. For one thread.
class ChildProcess {
 public:
  // Runs this program (/proc/self/exe) with `args`: in a process group of its own, so that Ctrl-C
  // at a terminal reaches only us; without standard input; with no signal blocked; without
  // variables that begin with HEADROOM_ (they are flags, and the child's are in `args`). When the
  // calling THREAD ends, the child gets `death_signal`. Errors are the system's.
  static absl::StatusOr<ChildProcess> Start(const std::vector<std::string>& args, int death_signal);
  ~ChildProcess();
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;

  pid_t pid() const { return pid_; }
  // Readable once the process has ended.
  int fd() const { return pid_fd_.get(); }

  void Signal(int signal);
  // How it ended, if it has.
  std::optional<ExitStatus> Poll();
  // The same, waiting at most so long.
  std::optional<ExitStatus> WaitFor(absl::Duration timeout);

 private:
  ChildProcess(pid_t pid, Fd pid_fd) : pid_(pid), pid_fd_(std::move(pid_fd)) {}
  void Kill();

  pid_t pid_ = -1;  // -1: moved from
  Fd pid_fd_;
  std::optional<ExitStatus> status_;
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_CHILD_PROCESS_H_
