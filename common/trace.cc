#include "common/trace.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "common/fd.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/steady_time.h"

namespace headroom {

std::atomic<bool> trace_internal::on{false};

namespace {

// Between two writes: a step of 32 layers on three streams is some thousand events.
constexpr size_t kMaxEvents = size_t{1} << 16;
constexpr absl::Duration kInterval = absl::Milliseconds(250);
constexpr int64_t kInstant = -1;
// Tracks are written as threads whose ids no thread has: Linux goes up to 2^22.
constexpr int32_t kFirstTrack = int32_t{1} << 30;

struct Event {
  const char* name;
  const char* arg_name;
  int64_t arg;
  int64_t begin_ns;
  int64_t duration_ns;  // kInstant
  int32_t row;          // id of a thread, or a TraceTrack
};

pid_t ThreadId() {
  static thread_local const auto id = static_cast<pid_t>(syscall(SYS_gettid));
  return id;
}

// The name of a thread of this process; empty if it has ended.
std::string ThreadName(pid_t thread) {
  char name[64] = {};
  const Fd fd(open(absl::StrCat("/proc/self/task/", thread, "/comm").c_str(), O_RDONLY | O_CLOEXEC));
  const ssize_t got = fd.valid() ? read(fd.get(), name, sizeof(name) - 1) : 0;
  std::string text(name, got > 0 ? static_cast<size_t>(got) : 0);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

absl::Status NoFile(const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat("--trace ", path));
}

class Tracer {
 public:
  absl::Status Start(const std::string& path, const std::string& process) {
    fd_ = Fd(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!fd_.valid()) return NoFile(path);
    // The first process opens the array; an array without an end is read all the same.
    flock(fd_.get(), LOCK_EX);
    struct stat stat = {};
    const bool first = fstat(fd_.get(), &stat) == 0 && stat.st_size == 0;
    std::string text = first ? "[\n" : "";
    absl::StrAppendFormat(&text,
                          "{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":%d,"
                          "\"args\":{\"name\":\"%s\"}},\n",
                          getpid(), process);
    Write(text);
    flock(fd_.get(), LOCK_UN);
    writing_.reserve(kMaxEvents);
    named_.clear();
    {
      MutexLock lock(&mutex_);
      events_.clear();  // what came too late for an earlier trace
      events_.reserve(kMaxEvents);
      stop_ = false;
    }
    trace_internal::on.store(true);
    thread_ = std::thread([this] { Loop(); });
    return absl::OkStatus();
  }

  void Stop() {
    {
      MutexLock lock(&mutex_);
      if (!thread_.joinable()) return;
      stop_ = true;
      wake_.SignalAll();
    }
    trace_internal::on.store(false);
    thread_.join();
    fd_.Reset();
  }

  TraceTrack MakeTrack(absl::string_view name) {
    MutexLock lock(&mutex_);
    tracks_.emplace_back(name);
    return TraceTrack{kFirstTrack + static_cast<int32_t>(tracks_.size()) - 1};
  }

  void Add(const Event& event) {
    MutexLock lock(&mutex_);
    if (events_.size() == kMaxEvents) {
      ++dropped_;
    } else {
      events_.push_back(event);
    }
  }

 private:
  void Loop() {
    pthread_setname_np(pthread_self(), "trace");
    for (bool stop = false; !stop;) {
      int64_t dropped = 0;
      {
        MutexLock lock(&mutex_);
        if (!stop_) wake_.WaitFor(&mutex_, kInterval);
        stop = stop_;
        writing_.swap(events_);
        dropped = std::exchange(dropped_, 0);
      }
      if (dropped > 0) LogWarning(absl::StrCat("trace: ", dropped, " events are left out"));
      Write(Text());
      writing_.clear();
    }
  }

  std::string RowName(int32_t row) {
    if (row < kFirstTrack) return ThreadName(row);
    MutexLock lock(&mutex_);
    return tracks_[static_cast<size_t>(row - kFirstTrack)];
  }

  std::string Text() {
    std::string text;
    for (const Event& event : writing_) {
      if (named_.insert(event.row).second) {
        absl::StrAppendFormat(&text,
                              "{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":%d,\"tid\":%d,"
                              "\"args\":{\"name\":\"%s\"}},\n",
                              getpid(), event.row, RowName(event.row));
      }
      absl::StrAppendFormat(&text, "{\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%d.%03d",
                            event.name, getpid(), event.row, event.begin_ns / 1000,
                            event.begin_ns % 1000);
      if (event.duration_ns == kInstant) {
        text += ",\"ph\":\"i\",\"s\":\"t\"";
      } else {
        absl::StrAppendFormat(&text, ",\"ph\":\"X\",\"dur\":%d.%03d", event.duration_ns / 1000,
                              event.duration_ns % 1000);
      }
      if (event.arg_name != nullptr) {
        absl::StrAppendFormat(&text, ",\"args\":{\"%s\":%d}", event.arg_name, event.arg);
      }
      text += "},\n";
    }
    return text;
  }

  // Appending is atomic on a local file: lines of several processes do not mix.
  void Write(const std::string& text) {
    if (text.empty() || !fd_.valid()) return;
    if (write(fd_.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
      LogWarning(absl::StrCat("trace: writing ", text.size(), " bytes failed"));
      fd_.Reset();
    }
  }

  Fd fd_;
  std::vector<Event> writing_;
  std::set<int32_t> named_;  // rows whose names have been written
  Mutex mutex_;
  CondVar wake_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t dropped_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Event> events_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> tracks_ ABSL_GUARDED_BY(mutex_);  // their names
  std::thread thread_;
};

// Never destroyed: threads may trace to the end.
Tracer& TheTracer() {
  static auto& tracer = *new Tracer;
  return tracer;
}

}  // namespace

absl::Status CheckTrace(const std::string& path) {
  const Fd there(open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NONBLOCK));
  if (there.valid()) return absl::OkStatus();
  if (errno != ENOENT) return NoFile(path);
  const std::string folder = std::filesystem::path(path).parent_path().string();
  if (access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) == 0) {
    return absl::OkStatus();
  }
  return NoFile(path);
}

absl::Status StartTrace(const std::string& path, const std::string& process) {
  return TheTracer().Start(path, process);
}

void StopTrace() {
  if (TraceOn()) TheTracer().Stop();
}

void TraceSlice(const char* name, int64_t begin_ns, int64_t end_ns, const char* arg_name,
                int64_t arg) {
  if (!TraceOn()) return;
  TheTracer().Add({name, arg_name, arg, begin_ns, end_ns - begin_ns, ThreadId()});
}

TraceTrack MakeTraceTrack(absl::string_view name) { return TheTracer().MakeTrack(name); }

void TraceSliceOn(TraceTrack track, const char* name, int64_t begin_ns, int64_t end_ns,
                  const char* arg_name, int64_t arg) {
  if (!TraceOn()) return;
  TheTracer().Add(
      {name, arg_name, arg, begin_ns, end_ns - begin_ns, static_cast<int32_t>(track)});
}

void TraceInstant(const char* name, const char* arg_name, int64_t arg) {
  if (!TraceOn()) return;
  TheTracer().Add({name, arg_name, arg, SteadyNs(), kInstant, ThreadId()});
}

}  // namespace headroom
