// Folders, processes and deadlines for tests that start the real programs.
#ifndef HEADROOM_TESTS_COMMON_TEST_PROCESSES_H_
#define HEADROOM_TESTS_COMMON_TEST_PROCESSES_H_

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"

namespace headroom {

// A folder of the test's own. Paths are short: a unix socket's may have 107 bytes.
class TestDir {
 public:
  // /tmp, or /dev/shm for what must lie on a tmpfs. A folder in /tmp stays if the test has failed.
  explicit TestDir(const std::string& parent = "/tmp");
  ~TestDir();
  TestDir(const TestDir&) = delete;
  TestDir& operator=(const TestDir&) = delete;

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
  bool keep_if_failed_;
};

// A program that runs. Killed and reaped by the destructor, and by the kernel when the thread that made
// it ends, as it does when the test dies; its log is printed if the test has failed.
class Process {
 public:
  // stdout and stderr are appended to `log_path`. Aborts if there is nothing to run.
  Process(std::vector<std::string> args, std::string log_path);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  // SIGKILL, SIGTERM, SIGSTOP, SIGCONT: nothing happens if it has ended.
  void Signal(int signal);
  // Nothing if it still runs after `most`; else what Exit() says.
  std::optional<int> Wait(absl::Duration most);
  bool running() { return !Wait(absl::ZeroDuration()).has_value(); }
  // SIGKILL, and waits for the end.
  void Kill();
  std::string Log() const;

 private:
  const std::string log_path_;
  pid_t pid_ = -1;
  std::optional<int> exit_;  // exit code, or 128 + the signal
};

// A command run to its end.
struct CommandResult {
  int exit_code = -1;  // 128 + the signal; -1 if it was killed for taking longer than allowed
  std::string out;
  std::string err;
};
CommandResult RunCommand(const std::vector<std::string>& args, absl::Duration most);

// That of HEADROOM_BIN_DIR, or the one beside this test's program.
std::string HeadroomBinary();
// Whether this build's checks make everything some times slower.
constexpr bool kSanitized =
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    true;
#else
    false;
#endif

// Looks every 5 ms; false if `condition` has not come true in time.
bool WaitUntil(absl::Duration most, const std::function<bool()>& condition);

// Pids of the children of `pid`, and of theirs.
std::vector<pid_t> DescendantsOf(pid_t pid);
// Its command line, words joined by spaces; empty if there is no such process.
std::string CommandLineOf(pid_t pid);

// Bytes that a process holds for itself now: anonymous memory and pages of files; shared memory is
// somebody else's.
int64_t MemoryOf(pid_t pid);

// Samples that every 10 ms.
class MemorySampler {
 public:
  explicit MemorySampler(pid_t pid);
  ~MemorySampler();

  // Ends it. Bytes, and how many samples there were.
  int64_t Stop();
  int64_t samples() const { return samples_; }

 private:
  const pid_t pid_;
  std::atomic<bool> stop_{false};
  int64_t peak_bytes_ = 0;
  int64_t samples_ = 0;
  std::thread thread_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_TEST_PROCESSES_H_
