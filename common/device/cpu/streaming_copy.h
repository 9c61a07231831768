// memcpy for what the copier does not read again: tiles and resident copies.
#ifndef HEADROOM_COMMON_DEVICE_CPU_STREAMING_COPY_H_
#define HEADROOM_COMMON_DEVICE_CPU_STREAMING_COPY_H_

#include <cstdint>

namespace headroom {

// Long copies are written past the caches, which saves reading the lines that are overwritten: 13
// against 8 GB/s from mapped memory on one core (Zen 3), and a third less traffic for the cores that
// compute meanwhile. The bytes are visible to whoever acquires what is released afterwards.
// REQUIRES: the ranges do not overlap.
void StreamingCopy(void* dst, const void* src, int64_t bytes);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CPU_STREAMING_COPY_H_
