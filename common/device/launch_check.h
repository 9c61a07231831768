// What every device checks when an operation is launched, with the same words: the operations of
// kernels/*.h name their ranges, and each must lie where the device may read and write.
#ifndef HEADROOM_COMMON_DEVICE_LAUNCH_CHECK_H_
#define HEADROOM_COMMON_DEVICE_LAUNCH_CHECK_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/checked_math.h"
#include "common/device/device.h"

namespace headroom {

inline absl::Status ForeignAddressError(absl::string_view op, const void* data) {
  return absl::InternalError(
      absl::StrCat(op, ": address ", absl::Hex(reinterpret_cast<uintptr_t>(data)),
                   " lies neither in the device's arena nor, where that is allowed, in registered "
                   "host memory"));
}

// INTERNAL names the operation and the last range that `allowed(data, bytes)` refuses.
template <typename Args, typename Allowed>
absl::Status CheckRanges(absl::string_view op, const Args& args, Allowed&& allowed) {
  const void* wrong = nullptr;
  bool ok = true;
  ForEachRange(args, [&](const void* data, int64_t bytes, kernels::Access) {
    if (bytes == 0 || allowed(data, bytes)) return;
    ok = false;
    wrong = data;
  });
  return ok ? absl::OkStatus() : ForeignAddressError(op, wrong);
}

// A copy: from the first row's first byte to the last row's last: a copy engine's rectangle must lie in one
// registered range as a whole. One side at least is `in_arena(data, bytes)`.
template <typename InArena, typename InHost>
absl::Status CheckCopy(const CopyArgs& a, InArena&& in_arena, InHost&& in_host) {
  if (a.width_bytes < 0 || a.height < 0 ||
      (a.height > 1 && (a.dst_pitch_bytes < a.width_bytes || a.src_pitch_bytes < a.width_bytes))) {
    return absl::InternalError(absl::StrCat("Copy: ", a.height, " rows of ", a.width_bytes,
                                            " bytes, pitches ", a.dst_pitch_bytes, " and ",
                                            a.src_pitch_bytes));
  }
  if (a.width_bytes == 0 || a.height == 0) return absl::OkStatus();
  const auto extent = [&a](int64_t pitch_bytes) {
    const std::optional<int64_t> rows = CheckedMul(a.height - 1, pitch_bytes);
    return rows.has_value() ? CheckedAdd(*rows, a.width_bytes).value_or(-1) : int64_t{-1};
  };
  const int64_t dst_bytes = extent(a.dst_pitch_bytes);
  const int64_t src_bytes = extent(a.src_pitch_bytes);
  const bool to_device = in_arena(a.dst, dst_bytes);
  const bool from_device = in_arena(a.src, src_bytes);
  if (!to_device && (!from_device || !in_host(a.dst, dst_bytes))) {
    return ForeignAddressError("Copy", a.dst);
  }
  if (!from_device && !in_host(a.src, src_bytes)) return ForeignAddressError("Copy", a.src);
  return absl::OkStatus();
}

template <typename InArena, typename InHost>
absl::Status CheckPost(const kernels::PostQueriesArgs& a, InArena&& in_arena, InHost&& in_host) {
  constexpr int64_t kFloat = sizeof(float);
  if (a.rows < 0 || a.row_floats < 0 || a.q_stride < a.row_floats) {
    return absl::InternalError(absl::StrCat("PostQueries: ", a.rows, " rows of ", a.row_floats,
                                            " floats, ", a.q_stride, " apart"));
  }
  if (a.rows > 0 && !in_arena(a.q, ((a.rows - 1) * a.q_stride + a.row_floats) * kFloat)) {
    return ForeignAddressError("PostQueries", a.q);
  }
  if (!in_host(a.queries, a.rows * a.row_floats * kFloat)) {
    return ForeignAddressError("PostQueries", a.queries);
  }
  if (!in_host(a.mailbox, sizeof(*a.mailbox))) return ForeignAddressError("PostQueries", a.mailbox);
  if (!in_host(a.slot, sizeof(*a.slot))) return ForeignAddressError("PostQueries", a.slot);
  return absl::OkStatus();
}

template <typename InHost>
absl::Status CheckAwait(const kernels::AwaitPartialsArgs& a, InHost&& in_host) {
  if (!in_host(a.mailbox, sizeof(*a.mailbox))) return ForeignAddressError("AwaitPartials", a.mailbox);
  if (!in_host(a.slot, sizeof(*a.slot))) return ForeignAddressError("AwaitPartials", a.slot);
  if (!in_host(a.status, sizeof(*a.status))) return ForeignAddressError("AwaitPartials", a.status);
  return absl::OkStatus();
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_LAUNCH_CHECK_H_
