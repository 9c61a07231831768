// Bytes of keys and values that an operation reads, for the accounts of every device.
#ifndef HEADROOM_COMMON_DEVICE_KV_BYTES_H_
#define HEADROOM_COMMON_DEVICE_KV_BYTES_H_

#include <cstdint>

#include "common/kv_layout.h"
#include "kernels/attention.h"
#include "kernels/copy_kv_rows.h"

namespace headroom {

inline int64_t KvBytesRead(const kernels::AttendArgs& a) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const kernels::AttendItem& item = a.items.host[i];
    int64_t tokens = 0;
    for (int32_t s = 0; s < item.span_count; ++s) {
      tokens += a.spans.host[item.span_begin + s].count;
    }
    bytes += tokens * (item.kv_head_end - item.kv_head_begin) * 2 * a.head_dim * kKvElementBytes;
  }
  return bytes;
}

inline int64_t KvBytesRead(const kernels::CopyKvRowsArgs& a) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const kernels::KvSpan& to = a.items.host[i].to;
    bytes += int64_t{to.count} * (to.kv_head_end - to.kv_head_begin) * 2 * a.head_dim *
             kKvElementBytes;
  }
  return bytes;
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_KV_BYTES_H_
