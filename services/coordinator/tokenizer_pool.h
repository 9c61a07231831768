// Threads beside gRPC's for what takes long with a text: tokenizing takes most of a second and more than
// 100 MB of memory a MB, and a health check must not wait for it.
#ifndef HEADROOM_SERVICES_COORDINATOR_TOKENIZER_POOL_H_
#define HEADROOM_SERVICES_COORDINATOR_TOKENIZER_POOL_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "common/mutex.h"

namespace headroom::coordinator {

// One thread is for long texts, so that their memory is that of one, and takes short ones while there are none; the
// others take only short ones, which so never wait for long ones. Thread-safe.
class TokenizerPool {
 public:
  static constexpr int64_t kLongBytes = int64_t{64} << 10;
  // Of work that has not ended.
  static constexpr int64_t kMaxCalls = 1024;
  static constexpr int64_t kMaxBytes = int64_t{64} << 20;

  explicit TokenizerPool(int threads);  // at least 2
  // Runs what has been taken, then ends.
  ~TokenizerPool();

  // As many threads as the host's processors suggest.
  static int DefaultThreads();

  // Has `work` run by one of the threads, in the order of the calls among texts of its kind. RESOURCE_EXHAUSTED if
  // kMaxCalls or kMaxBytes are in work already; a text alone is never too long.
  absl::Status Run(int64_t text_bytes, std::function<void()> work);

 private:
  struct Task {
    int64_t text_bytes;
    std::function<void()> work;
  };
  void Loop(bool takes_long);
  // The queue that a thread is to take from, or null.
  std::deque<Task>* Next(bool takes_long) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  CondVar changed_;
  std::deque<Task> short_ ABSL_GUARDED_BY(mutex_);
  std::deque<Task> long_ ABSL_GUARDED_BY(mutex_);
  int64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_TOKENIZER_POOL_H_
