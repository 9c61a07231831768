// Runs one of the services as a process of its own.
#ifndef HEADROOM_SERVICES_HEADROOM_SERVER_PROCESS_H_
#define HEADROOM_SERVICES_HEADROOM_SERVER_PROCESS_H_

#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/trace.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/flag_sources.h"
#include "services/headroom/process_signals.h"

namespace headroom::cli {

// SIGTERM and SIGINT: while the server starts the process ends at once (there is nothing to save);
// then the first asks it to stop, and the second ends it. Made on the main thread before any other.
class StopSignal {
 public:
  static absl::StatusOr<std::unique_ptr<StopSignal>> Install();

  // From now on a signal is waited for.
  void Started();
  void Wait();

 private:
  StopSignal() = default;
  void OnSignal(int signal);

  Mutex mutex_;
  CondVar changed_;
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<SignalThread> thread_;  // last: it calls OnSignal()
};

// Starts a server, and stops it at a signal. Returns the exit code.
template <typename Server>
int RunServer(const LogOptions& log, const FlagSources& sources,
              const std::function<absl::StatusOr<std::unique_ptr<Server>>()>& start,
              const std::function<void(Server&)>& stop) {
  ConfigureLog(log);
  absl::StatusOr<std::unique_ptr<StopSignal>> signal = StopSignal::Install();
  if (signal.ok() && !log.trace_path.empty()) {
    if (absl::Status status = StartTrace(log.trace_path, log.process); !status.ok()) {
      LogError(DescribeError(sources.Explain(status)));
      return kExitUsage;
    }
  }
  if (!signal.ok()) {
    LogError(DescribeError(signal.status()));
    return kExitFailed;
  }
  absl::StatusOr<std::unique_ptr<Server>> server = start();
  if (!server.ok()) {
    LogError(DescribeError(sources.Explain(server.status())));
    return ExitCodeOfStart(server.status());
  }
  (*signal)->Started();
  (*signal)->Wait();
  LogInfo("stopping");
  stop(**server);
  server->reset();
  StopTrace();
  LogInfo("stopped");
  return kExitOk;
}

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_SERVER_PROCESS_H_
