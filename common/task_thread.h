// A thread that runs tasks in the order in which they were posted.
#ifndef HEADROOM_COMMON_TASK_THREAD_H_
#define HEADROOM_COMMON_TASK_THREAD_H_

#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/mutex.h"

namespace headroom {

// Thread-safe. What posts must itself be bounded: each use says by what.
class TaskThread {
 public:
  using Task = std::function<void()>;

  // `after_tasks` runs on the thread after each batch of tasks, and every `tick` when there are
  // none.
  explicit TaskThread(absl::Duration tick = absl::Seconds(1), Task after_tasks = nullptr)
      : tick_(tick), after_tasks_(std::move(after_tasks)) {}
  ~TaskThread() { Stop(); }

  void Start() {
    thread_ = std::thread([this] { Loop(); });
  }

  // False once the thread is stopping: the task will not run.
  bool Post(Task task) {
    MutexLock lock(&mutex_);
    if (stopping_) return false;
    tasks_.push_back(std::move(task));
    posted_.Signal();
    return true;
  }

  // Runs what has been posted, then ends. Called by another thread.
  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
      posted_.SignalAll();
    }
    if (thread_.joinable()) thread_.join();
  }

  bool stopping() const {
    MutexLock lock(&mutex_);
    return stopping_;
  }

  // Waits for `duration` or until Stop(). For tasks that try again after a pause.
  void Pause(absl::Duration duration) {
    const absl::Time end = absl::Now() + duration;
    MutexLock lock(&mutex_);
    while (!stopping_ && absl::Now() < end) posted_.WaitFor(&mutex_, end - absl::Now());
  }

 private:
  void Loop() {
    std::vector<Task> batch;
    for (;;) {
      bool stop;
      {
        MutexLock lock(&mutex_);
        if (tasks_.empty() && !stopping_) posted_.WaitFor(&mutex_, tick_);
        batch.swap(tasks_);
        stop = stopping_ && batch.empty();
      }
      if (stop) return;
      for (Task& task : batch) task();
      batch.clear();
      if (after_tasks_ != nullptr) after_tasks_();
    }
  }

  const absl::Duration tick_;
  const Task after_tasks_;
  mutable Mutex mutex_;
  CondVar posted_;
  std::vector<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TASK_THREAD_H_
