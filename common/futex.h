// Waiting on a 32-bit word: within one process, or (Shared...) in memory that several have mapped.
#ifndef HEADROOM_COMMON_FUTEX_H_
#define HEADROOM_COMMON_FUTEX_H_

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <ctime>

#include "absl/time/time.h"

namespace headroom {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));

// Sleeps while `word` is `value`, at most for `timeout`. May wake for no reason.
inline void FutexWait(const std::atomic<uint32_t>& word, uint32_t value, absl::Duration timeout) {
  const timespec limit = absl::ToTimespec(timeout);
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, &limit,
          nullptr, 0);
}

inline void FutexWakeAll(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

inline void SharedFutexWait(const std::atomic<uint32_t>& word, uint32_t value,
                            absl::Duration timeout) {
  const timespec limit = absl::ToTimespec(timeout);
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT, value, &limit, nullptr,
          0);
}
inline void SharedFutexWakeAll(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr,
          0);
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_FUTEX_H_
