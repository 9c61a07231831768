// Lets one thread cancel what another is calling.
#ifndef HEADROOM_SERVICES_HEADROOM_CALL_CANCELLER_H_
#define HEADROOM_SERVICES_HEADROOM_CALL_CANCELLER_H_

#include <functional>
#include <utility>

#include "common/mutex.h"

namespace headroom::cli {

// Thread-safe. Cancelled once, it cancels what runs and what is begun later.
class CallCanceller {
 public:
  // For as long as it lives, Cancel() calls `cancel`; at once if it has been called already.
  class Scope {
   public:
    Scope(CallCanceller* canceller, std::function<void()> cancel) : canceller_(canceller) {
      MutexLock lock(&canceller_->mutex_);
      if (canceller_->cancelled_) cancel();
      canceller_->cancel_ = std::move(cancel);
    }
    ~Scope() {
      MutexLock lock(&canceller_->mutex_);
      canceller_->cancel_ = nullptr;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    CallCanceller* const canceller_;
  };

  void Cancel() {
    MutexLock lock(&mutex_);
    cancelled_ = true;
    if (cancel_ != nullptr) cancel_();
  }

  bool cancelled() const {
    MutexLock lock(&mutex_);
    return cancelled_;
  }

 private:
  mutable Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  std::function<void()> cancel_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_CALL_CANCELLER_H_
