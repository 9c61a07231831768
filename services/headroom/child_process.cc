#include "services/headroom/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace headroom::cli {
namespace {

constexpr char kThisProgram[] = "/proc/self/exe";

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

constexpr int kExecFailed = 127;  // what shells say, too

[[noreturn]] void FailChild(int error_fd) {
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(error_fd, &error, sizeof(error));
  _exit(kExecFailed);
}

// After fork(): only calls that are safe beside other threads' locks. Does not return.
[[noreturn]] void BecomeChild(pid_t parent, int death_signal, int error_fd, char* const* argv,
                              char* const* envp) {
  const int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (prctl(PR_SET_PDEATHSIG, death_signal) != 0 || setpgid(0, 0) != 0 || null_fd < 0 ||
      dup2(null_fd, STDIN_FILENO) < 0) {
    FailChild(error_fd);
  }
  if (getppid() != parent) _exit(kExecFailed);  // it died before it could be noticed
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execve(kThisProgram, argv, envp);
  FailChild(error_fd);
}

}  // namespace

std::string ExitStatus::ToString() const {
  if (!by_signal) return absl::StrCat("exited with code ", code);
  const char* const name = strsignal(code);
  return absl::StrCat("was killed by signal ", code, " (", name != nullptr ? name : "unknown", ")");
}

absl::StatusOr<ChildProcess> ChildProcess::Start(const std::vector<std::string>& args,
                                                 int death_signal) {
  std::vector<std::string> arguments = {"headroom"};
  arguments.insert(arguments.end(), args.begin(), args.end());
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (!absl::StartsWith(*variable, "HEADROOM_")) variables.emplace_back(*variable);
  }
  const std::vector<char*> argv = Pointers(arguments);
  const std::vector<char*> envp = Pointers(variables);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe2");
  const Fd errors(ends[0]);
  Fd child_end(ends[1]);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::ErrnoToStatus(errno, "fork");
  if (pid == 0) BecomeChild(parent, death_signal, child_end.get(), argv.data(), envp.data());
  child_end.Reset();
  Fd pid_fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  const int pid_fd_error = errno;
  ChildProcess child(pid, std::move(pid_fd));
  // Ends with exec, which closes the other end.
  int error = 0;
  ssize_t bytes;
  do {
    bytes = read(errors.get(), &error, sizeof(error));
  } while (bytes < 0 && errno == EINTR);
  if (bytes == sizeof(error)) return absl::ErrnoToStatus(error, "starting a process");
  if (!child.pid_fd_.valid()) return absl::ErrnoToStatus(pid_fd_error, "pidfd_open");
  return child;
}

ChildProcess::~ChildProcess() { Kill(); }

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pid_fd_(std::move(other.pid_fd_)),
      status_(other.status_) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  if (this != &other) {
    Kill();
    pid_ = std::exchange(other.pid_, -1);
    pid_fd_ = std::move(other.pid_fd_);
    status_ = other.status_;
  }
  return *this;
}

void ChildProcess::Kill() {
  if (pid_ < 0 || status_.has_value()) return;
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
}

void ChildProcess::Signal(int signal) {
  // Until it is waited for its id is nobody else's.
  if (pid_ >= 0 && !status_.has_value()) kill(pid_, signal);
}

std::optional<ExitStatus> ChildProcess::Poll() {
  if (status_.has_value() || pid_ < 0) return status_;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) != pid_) return std::nullopt;
  status_ = WIFSIGNALED(status) ? ExitStatus{true, WTERMSIG(status)}
                                : ExitStatus{false, WEXITSTATUS(status)};
  return status_;
}

std::optional<ExitStatus> ChildProcess::WaitFor(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    if (const std::optional<ExitStatus> status = Poll()) return status;
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return std::nullopt;
    pollfd fd = {pid_fd_.get(), POLLIN, 0};
    const int64_t ms = absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1)));
    poll(&fd, 1, static_cast<int>(std::min<int64_t>(ms, INT_MAX)));
  }
}

}  // namespace headroom::cli
