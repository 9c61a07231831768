#include "services/headroom/process_signals.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "absl/time/clock.h"

namespace headroom::cli {

absl::StatusOr<ProcessSignals> ProcessSignals::Block(std::initializer_list<int> signals) {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : signals) sigaddset(&set, signal);
  if (const int error = pthread_sigmask(SIG_BLOCK, &set, nullptr); error != 0) {
    return absl::ErrnoToStatus(error, "blocking signals");
  }
  Fd fd(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "signalfd");
  return ProcessSignals(std::move(fd));
}

int ProcessSignals::Take() {
  signalfd_siginfo info;
  ssize_t bytes;
  do {
    bytes = read(fd_.get(), &info, sizeof(info));
  } while (bytes < 0 && errno == EINTR);
  return bytes == sizeof(info) ? static_cast<int>(info.ssi_signo) : 0;
}

SignalThread::SignalThread(ProcessSignals signals, std::function<void(int)> on_signal)
    : signals_(std::move(signals)),
      on_signal_(std::move(on_signal)),
      stop_(eventfd(0, EFD_CLOEXEC)),
      thread_([this] { Loop(); }) {}

SignalThread::~SignalThread() {
  const uint64_t one = 1;
  // An eventfd takes 8 bytes at once or not at all, and not at all only near 2^64.
  [[maybe_unused]] const ssize_t written = write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

void SignalThread::Loop() {
  absl::Time last = absl::InfinitePast();
  for (;;) {
    pollfd fds[] = {{signals_.fd(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) return;
    if (fds[1].revents != 0) return;
    while (const int signal = signals_.Take()) {
      const absl::Time now = absl::Now();
      if (now - last >= kSameSignal) on_signal_(signal);
      last = now;
    }
  }
}

}  // namespace headroom::cli
