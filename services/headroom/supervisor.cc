#include "services/headroom/supervisor.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "common/status.h"
#include "services/headroom/exit_code.h"

namespace headroom::cli {
namespace {

constexpr absl::Duration kFirstDelay = absl::Milliseconds(100);
constexpr absl::Duration kLongestDelay = absl::Seconds(5);
constexpr absl::Duration kLongLife = absl::Seconds(30);
// What a process may take after its own deadlines (a gRPC server gives calls up to 5 s to end).
constexpr absl::Duration kStopGrace = absl::Seconds(10);

}  // namespace

absl::Duration RestartDelay::Next(absl::Duration lived) {
  next_ = lived >= kLongLife || next_ == absl::ZeroDuration() ? kFirstDelay
                                                             : std::min(2 * next_, kLongestDelay);
  return next_;
}

Supervisor::Supervisor(std::vector<ChildSpec> specs, ProcessSignals signals,
                       absl::Duration drain_timeout)
    : signals_(std::move(signals)), drain_timeout_(drain_timeout) {
  for (ChildSpec& spec : specs) children_.emplace_back().spec = std::move(spec);
}

int Supervisor::Run() {
  StartDue();
  while (phase_ == Phase::kRunning || AnyRuns(true) || AnyRuns(false)) {
    Wait();
    TakeSignals();
    for (Child& child : children_) Reap(child);
    StartDue();
    AdvanceStop();
  }
  return exit_code_;
}

absl::Status Supervisor::Start(Child& child) {
  if (!child.spec.socket_path.empty()) unlink(child.spec.socket_path.c_str());
  HEADROOM_ASSIGN_OR_RETURN(child.process, ChildProcess::Start(child.spec.args, SIGKILL));
  ++child.starts;
  child.started = absl::Now();
  LogInfo(absl::StrCat("started ", child.spec.name, ", process ", child.process->pid()));
  return absl::OkStatus();
}

void Supervisor::Wait() {
  absl::Time next = phase_deadline_;
  std::vector<pollfd> fds = {{signals_.fd(), POLLIN, 0}};
  for (const Child& child : children_) {
    if (child.process.has_value()) {
      fds.push_back({child.process->fd(), POLLIN, 0});
    } else {
      next = std::min(next, child.start_at);
    }
  }
  int timeout_ms = -1;
  if (next != absl::InfiniteFuture()) {
    const absl::Duration left = std::max(next - absl::Now(), absl::ZeroDuration());
    timeout_ms = static_cast<int>(std::min<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), INT_MAX));
  }
  poll(fds.data(), fds.size(), timeout_ms);
}

void Supervisor::TakeSignals() {
  while (const int signal = signals_.Take()) {
    if (phase_ == Phase::kRunning) {
      LogInfo(absl::StrCat("stopping: ", strsignal(signal)));
      stop_asked_ = absl::Now();
      BeginStop(0);
    } else if (absl::Now() - stop_asked_ >= kSameSignal) {
      LogWarning("a second signal: everything is killed");
      exit_code_ = exit_code_ == 0 ? 1 : exit_code_;
      EnterStopping(SIGKILL);
      SignalAll(true, SIGKILL);
    }
  }
}

void Supervisor::Reap(Child& child) {
  if (!child.process.has_value()) return;
  const std::optional<ExitStatus> status = child.process->Poll();
  if (!status.has_value()) return;
  const absl::Duration lived = absl::Now() - child.started;
  child.process.reset();
  const bool stops =
      phase_ == Phase::kStopping || (phase_ == Phase::kDraining && child.spec.drains_first);
  child.start_at = absl::InfiniteFuture();
  if (stops) {
    LogInfo(absl::StrCat(child.spec.name, " ", status->ToString()));
  } else if (child.starts == 1 && !status->by_signal && status->code != 0 &&
             status->code != kExitDeviceLost) {
    LogError(absl::StrCat(child.spec.name, " ", status->ToString(), " at its first start"));
    BeginStop(status->code);
  } else {
    const absl::Duration delay = child.delay.Next(lived);
    child.start_at = absl::Now() + delay;
    LogWarning(absl::StrCat(child.spec.name, " ", status->ToString(), " after ",
                            absl::FormatDuration(absl::Trunc(lived, absl::Milliseconds(1))),
                            ": started again in ", absl::FormatDuration(delay)));
  }
}

void Supervisor::StartDue() {
  for (Child& child : children_) {
    const bool wanted = phase_ == Phase::kRunning ||
                        (phase_ == Phase::kDraining && !child.spec.drains_first);
    if (!wanted || child.process.has_value() || absl::Now() < child.start_at) continue;
    if (const absl::Status status = Start(child); !status.ok()) {
      LogError(absl::StrCat(child.spec.name, ": ", status.message()));
      if (child.starts == 0) return BeginStop(1);
      child.start_at = absl::Now() + child.delay.Next(absl::ZeroDuration());
    }
  }
}

void Supervisor::BeginStop(int exit_code) {
  if (phase_ != Phase::kRunning) return;
  exit_code_ = exit_code;
  phase_ = Phase::kDraining;
  for (Child& child : children_) {
    if (child.starts == 0) child.start_at = absl::InfiniteFuture();
  }
  phase_deadline_ = absl::Now() + drain_timeout_ + kStopGrace;
  SignalAll(true, SIGTERM);
}

void Supervisor::AdvanceStop() {
  if (phase_ == Phase::kRunning) return;
  const bool late = absl::Now() >= phase_deadline_;
  if (late) {
    LogWarning("what has not stopped in time is killed");
    SignalAll(phase_ == Phase::kDraining, SIGKILL);
    phase_deadline_ = absl::InfiniteFuture();
  }
  if (phase_ == Phase::kDraining && !AnyRuns(true)) EnterStopping(SIGTERM);
}

void Supervisor::EnterStopping(int signal) {
  phase_ = Phase::kStopping;
  phase_deadline_ = absl::Now() + kStopGrace;
  for (Child& child : children_) child.start_at = absl::InfiniteFuture();
  SignalAll(false, signal);
}

bool Supervisor::AnyRuns(bool drains_first) const {
  return std::any_of(children_.begin(), children_.end(), [&](const Child& child) {
    return child.spec.drains_first == drains_first && child.process.has_value();
  });
}

void Supervisor::SignalAll(bool drains_first, int signal) {
  for (Child& child : children_) {
    if (child.spec.drains_first == drains_first && child.process.has_value()) {
      child.process->Signal(signal);
    }
  }
}

}  // namespace headroom::cli
