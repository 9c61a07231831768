#include "services/headroom/server_process.h"

#include <signal.h>

#include <cstdlib>

#include "common/status.h"

namespace headroom::cli {

absl::StatusOr<std::unique_ptr<StopSignal>> StopSignal::Install() {
  HEADROOM_ASSIGN_OR_RETURN(ProcessSignals signals, ProcessSignals::Block({SIGTERM, SIGINT}));
  std::unique_ptr<StopSignal> stop(new StopSignal());
  stop->thread_ = std::make_unique<SignalThread>(
      std::move(signals), [stop = stop.get()](int signal) { stop->OnSignal(signal); });
  return stop;
}

void StopSignal::Started() {
  MutexLock lock(&mutex_);
  started_ = true;
}

void StopSignal::Wait() {
  MutexLock lock(&mutex_);
  while (!stopping_) changed_.Wait(&mutex_);
}

void StopSignal::OnSignal(int signal) {
  MutexLock lock(&mutex_);
  if (!started_) std::_Exit(128 + signal);
  if (stopping_) {
    LogWarning("a second signal: ending at once");
    std::_Exit(kExitFailed);
  }
  stopping_ = true;
  changed_.SignalAll();
}

}  // namespace headroom::cli
