// Tells ThreadSanitizer what an operation of kernels/*.h reads and writes, in whatever way it does so;
// nothing in other builds.
#ifndef HEADROOM_COMMON_DEVICE_TOUCH_RANGES_H_
#define HEADROOM_COMMON_DEVICE_TOUCH_RANGES_H_

#include <cstdint>

#include "kernels/types.h"

#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

namespace headroom {

template <typename Args>
void TouchRanges([[maybe_unused]] const Args& args) {
#if defined(__SANITIZE_THREAD__)
  ForEachRange(args, [](const void* data, int64_t bytes, kernels::Access access) {
    void* const at = const_cast<void*>(data);
    if (access == kernels::Access::kRead) {
      __tsan_read_range(at, static_cast<unsigned long>(bytes));
    } else {
      __tsan_write_range(at, static_cast<unsigned long>(bytes));
    }
  });
#endif
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_TOUCH_RANGES_H_
