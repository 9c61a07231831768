#include "tests/common/test_processes.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace headroom {
namespace {

constexpr size_t kPrintedLogBytes = 16 << 10;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int ExitOf(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Only what is safe between fork and exec of a process with threads.
[[noreturn]] void BecomeProgram(char* const* argv, int out, int err, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // it died before the line above
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  const int nothing = open("/dev/null", O_RDONLY);
  dup2(nothing, STDIN_FILENO);
  for (int fd = STDERR_FILENO + 1; fd < 1024; ++fd) close(fd);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execv(argv[0], argv);
  _exit(127);
}

pid_t Spawn(const std::vector<std::string>& args, const std::string& out_path,
            const std::string& err_path) {
  std::vector<char*> argv;
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  constexpr int kFlags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
  const int out = open(out_path.c_str(), kFlags, 0600);
  const int err = open(err_path.c_str(), kFlags, 0600);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) BecomeProgram(argv.data(), out, err, parent);
  close(out);
  close(err);
  if (pid < 0 || out < 0 || err < 0) {
    std::perror(absl::StrCat("starting ", args[0]).c_str());
    abort();
  }
  return pid;
}

}  // namespace

TestDir::TestDir(const std::string& parent) : keep_if_failed_(parent == "/tmp") {
  path_ = absl::StrCat(parent, "/headroom-test-XXXXXX");
  if (mkdtemp(path_.data()) == nullptr) {
    std::perror(path_.c_str());
    abort();
  }
}

TestDir::~TestDir() {
  if (keep_if_failed_ && testing::Test::HasFailure()) {
    std::printf("kept: %s\n", path_.c_str());
    return;
  }
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

// ---------------------------------------------------------------- processes

Process::Process(std::vector<std::string> args, std::string log_path)
    : log_path_(std::move(log_path)), pid_(Spawn(args, log_path_, log_path_)) {}

Process::~Process() {
  Kill();
  if (!testing::Test::HasFailure()) return;
  std::string log = Log();
  if (log.size() > kPrintedLogBytes) log = "..." + log.substr(log.size() - kPrintedLogBytes);
  std::printf("---- %s\n%s\n", log_path_.c_str(), log.c_str());
}

void Process::Signal(int signal) {
  if (running()) kill(pid_, signal);
}

std::optional<int> Process::Wait(absl::Duration most) {
  const absl::Time deadline = absl::Now() + most;
  while (!exit_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      exit_ = ExitOf(status);
    } else if (absl::Now() >= deadline) {
      break;
    } else {
      absl::SleepFor(absl::Milliseconds(2));
    }
  }
  return exit_;
}

void Process::Kill() {
  Signal(SIGKILL);
  if (!Wait(absl::Seconds(20)).has_value()) std::printf("pid %d does not die\n", pid_);
}

std::string Process::Log() const { return ReadFile(log_path_); }

CommandResult RunCommand(const std::vector<std::string>& args, absl::Duration most) {
  const TestDir dir;
  const pid_t pid = Spawn(args, dir.File("out"), dir.File("err"));
  const absl::Time deadline = absl::Now() + most;
  CommandResult result;
  int status = 0;
  while (waitpid(pid, &status, WNOHANG) == 0) {
    if (absl::Now() >= deadline) {
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      result.err = absl::StrCat("killed after ", absl::FormatDuration(most), "\n");
      break;
    }
    absl::SleepFor(absl::Milliseconds(2));
  }
  if (result.err.empty()) result.exit_code = ExitOf(status);
  result.out = ReadFile(dir.File("out"));
  result.err += ReadFile(dir.File("err"));
  return result;
}

std::string HeadroomBinary() {
  if (const char* const dir = getenv("HEADROOM_BIN_DIR")) return absl::StrCat(dir, "/headroom");
  return std::filesystem::read_symlink("/proc/self/exe").replace_filename("headroom");
}

bool WaitUntil(absl::Duration most, const std::function<bool()>& condition) {
  for (const absl::Time deadline = absl::Now() + most; absl::Now() < deadline;) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return condition();
}

std::vector<pid_t> DescendantsOf(pid_t pid) {
  std::vector<pid_t> found;
  std::error_code ignored;
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  for (const auto& task : std::filesystem::directory_iterator(tasks, ignored)) {
    std::istringstream children(ReadFile(task.path() / "children"));
    for (pid_t child; children >> child;) {
      found.push_back(child);
      const std::vector<pid_t> theirs = DescendantsOf(child);
      found.insert(found.end(), theirs.begin(), theirs.end());
    }
  }
  return found;
}

std::string CommandLineOf(pid_t pid) {
  std::string line = ReadFile(absl::StrCat("/proc/", pid, "/cmdline"));
  std::replace(line.begin(), line.end(), '\0', ' ');
  return line;
}

// ---------------------------------------------------------------- memory

int64_t MemoryOf(pid_t pid) {
  std::istringstream status(ReadFile(absl::StrCat("/proc/", pid, "/status")));
  int64_t kib = 0;
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("RssAnon:", 0) == 0 || line.rfind("RssFile:", 0) == 0) {
      kib += atoll(line.c_str() + line.find(':') + 1);
    }
  }
  return kib << 10;
}

MemorySampler::MemorySampler(pid_t pid) : pid_(pid) {
  thread_ = std::thread([this] {
    while (!stop_.load()) {
      peak_bytes_ = std::max(peak_bytes_, MemoryOf(pid_));
      ++samples_;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });
}

MemorySampler::~MemorySampler() { Stop(); }

int64_t MemorySampler::Stop() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
  return peak_bytes_;
}

}  // namespace headroom
