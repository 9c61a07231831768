// Calls a function when files have changed. Polled: what replaces a file (a rename, the swap of a
// link to its folder) is seen like what writes into it.
#ifndef HEADROOM_COMMON_FILE_WATCH_H_
#define HEADROOM_COMMON_FILE_WATCH_H_

#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "common/mutex.h"

namespace headroom {

class FileWatch {
 public:
  // Remembers what the files are like: they are to be read after this. Empty paths are left out.
  explicit FileWatch(std::vector<std::string> paths) : paths_(std::move(paths)), seen_(Look()) {}
  // What is not as it was when this was made calls `changed`, on the watch's own thread. Once.
  void Start(absl::Duration interval, std::function<void()> changed) {
    interval_ = interval;
    changed_ = std::move(changed);
    thread_ = std::thread([this] { Loop(); });
  }
  ~FileWatch() {
    if (!thread_.joinable()) return;
    {
      MutexLock lock(&mutex_);
      stop_ = true;
      stopped_.SignalAll();
    }
    thread_.join();
  }

 private:
  using Stat = std::array<int64_t, 5>;  // device, inode, size, seconds, nanoseconds; 0: not there

  std::vector<Stat> Look() const {
    std::vector<Stat> looks;
    for (const std::string& path : paths_) {
      struct stat s = {};
      if (path.empty() || stat(path.c_str(), &s) != 0) {
        looks.push_back({});
        continue;
      }
      looks.push_back({static_cast<int64_t>(s.st_dev), static_cast<int64_t>(s.st_ino),
                       static_cast<int64_t>(s.st_size), s.st_mtim.tv_sec, s.st_mtim.tv_nsec});
    }
    return looks;
  }

  void Loop() {
    for (;;) {
      {
        MutexLock lock(&mutex_);
        if (!stop_) stopped_.WaitFor(&mutex_, interval_);
        if (stop_) return;
      }
      std::vector<Stat> now = Look();
      if (now == seen_) continue;
      seen_ = std::move(now);  // before reading: what changes meanwhile is a change again
      changed_();
    }
  }

  const std::vector<std::string> paths_;
  absl::Duration interval_;
  std::function<void()> changed_;
  std::vector<Stat> seen_;
  Mutex mutex_;
  CondVar stopped_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_FILE_WATCH_H_
