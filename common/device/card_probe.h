// What a bench asks of the GPU beyond Device: what of its memory is in use, and how fast it reads
// it. Both are of the card that CreateDevice() takes, which must have been called; UNAVAILABLE in a
// binary without the CUDA device.
#ifndef HEADROOM_COMMON_DEVICE_CARD_PROBE_H_
#define HEADROOM_COMMON_DEVICE_CARD_PROBE_H_

#include <cstdint>

#include "absl/status/statusor.h"

namespace headroom {

// By whichever process: contexts, code, arenas, and what libraries took beside them.
absl::StatusOr<int64_t> CardMemoryInUse();

// Bytes/s of a kernel that does nothing but read, the best of three measurements. `data` is device
// memory, larger than the card's cache, random or at least not constant; `bytes` is a multiple of
// 32 KiB. Nothing else may run on the card.
absl::StatusOr<double> CardReadRate(uint8_t* data, int64_t bytes);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CARD_PROBE_H_
