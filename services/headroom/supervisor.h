// Keeps processes running, and stops them in order.
#ifndef HEADROOM_SERVICES_HEADROOM_SUPERVISOR_H_
#define HEADROOM_SERVICES_HEADROOM_SUPERVISOR_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "services/headroom/child_process.h"
#include "services/headroom/process_signals.h"

namespace headroom::cli {

// How long to wait before a process is started again: 100 ms, doubling to 5 s; a process that lived
// for 30 s begins anew.
class RestartDelay {
 public:
  absl::Duration Next(absl::Duration lived);

 private:
  absl::Duration next_ = absl::ZeroDuration();
};

struct ChildSpec {
  std::string name;
  std::vector<std::string> args;
  std::string socket_path;    // removed before each start: a killed process leaves it
  bool drains_first = false;  // is stopped before the others
};

// For the main thread: children die with it.
class Supervisor {
 public:
  // After the first signal processes that drain have `drain_timeout` and some seconds more.
  Supervisor(std::vector<ChildSpec> specs, ProcessSignals signals, absl::Duration drain_timeout);

  // Starts all, starts again what dies, until SIGTERM or SIGINT, which stop them in order; a second
  // signal kills. Returns the exit code: 0; 1 after a second signal or if one cannot be started;
  // that of a process that ends by itself with an error at its first start, since another start
  // would not help.
  int Run();

 private:
  enum class Phase { kRunning, kDraining, kStopping };
  struct Child {
    ChildSpec spec;
    std::optional<ChildProcess> process;
    RestartDelay delay;
    int starts = 0;
    absl::Time started;
    absl::Time start_at = absl::InfinitePast();  // if it does not run
  };

  absl::Status Start(Child& child);
  // Sleeps until a signal, the end of a process, or the next thing to do.
  void Wait();
  void TakeSignals();
  void Reap(Child& child);
  void StartDue();
  void BeginStop(int exit_code);
  void AdvanceStop();
  void EnterStopping(int signal);
  // Whether children of this kind still run.
  bool AnyRuns(bool drains_first) const;
  void SignalAll(bool drains_first, int signal);

  std::vector<Child> children_;
  ProcessSignals signals_;
  const absl::Duration drain_timeout_;
  Phase phase_ = Phase::kRunning;
  absl::Time phase_deadline_ = absl::InfiniteFuture();
  absl::Time stop_asked_ = absl::InfinitePast();
  int exit_code_ = 0;
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_SUPERVISOR_H_
