#include "services/coordinator/tokenizer_pool.h"

#include <algorithm>
#include <utility>

#include "services/coordinator/errors.h"

namespace headroom::coordinator {

TokenizerPool::TokenizerPool(int threads) {
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this, takes_long = i == 0] { Loop(takes_long); });
  }
}

TokenizerPool::~TokenizerPool() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

int TokenizerPool::DefaultThreads() {
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 4, 2, 4);
}

absl::Status TokenizerPool::Run(int64_t text_bytes, std::function<void()> work) {
  MutexLock lock(&mutex_);
  if (calls_ >= kMaxCalls || (bytes_ > 0 && text_bytes > kMaxBytes - bytes_)) {
    return TokenizerBusyError(calls_, bytes_);
  }
  ++calls_;
  bytes_ += text_bytes;
  (text_bytes > kLongBytes ? long_ : short_).push_back({text_bytes, std::move(work)});
  changed_.SignalAll();  // one alone may be a thread that does not take it
  return absl::OkStatus();
}

std::deque<TokenizerPool::Task>* TokenizerPool::Next(bool takes_long) {
  if (takes_long && !long_.empty()) return &long_;
  return short_.empty() ? nullptr : &short_;
}

void TokenizerPool::Loop(bool takes_long) {
  MutexLock lock(&mutex_);
  for (;;) {
    std::deque<Task>* const queue = Next(takes_long);
    if (queue == nullptr) {
      if (stopping_) return;
      changed_.Wait(&mutex_);
      continue;
    }
    Task task = std::move(queue->front());
    queue->pop_front();
    mutex_.Unlock();
    task.work();
    task.work = nullptr;  // what it holds goes without the lock
    mutex_.Lock();
    --calls_;
    bytes_ -= task.text_bytes;
  }
}

}  // namespace headroom::coordinator
