// Sizes as people write and read them.
#ifndef HEADROOM_COMMON_BYTES_TEXT_H_
#define HEADROOM_COMMON_BYTES_TEXT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headroom {

// "340MiB", "1.5 GiB", "64MB", "4096": KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of
// 1024, in any case; no unit or B is bytes. A fraction of a byte is dropped. INVALID_ARGUMENT: not
// a size, negative, or beyond int64.
absl::StatusOr<int64_t> ParseBytes(absl::string_view text);

// In the largest unit (KiB to TiB) that keeps the number at 1 or more, with one digit after the
// point: "340.0 MiB"; "512 bytes" below 1 KiB.
std::string FormatBytes(int64_t bytes);

}  // namespace headroom

#endif  // HEADROOM_COMMON_BYTES_TEXT_H_
