// What a sequence's draws go by beside the logits, as device memory will hold it (kernels/sample.h).
#ifndef HEADROOM_SERVICES_WORKER_DRAW_STATE_H_
#define HEADROOM_SERVICES_WORKER_DRAW_STATE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/sample.h"
#include "services/worker/step.h"

namespace headroom {

// Whether the sampler draws by anything that only a history can tell.
inline bool Penalises(const kernels::SampleRow& row) {
  return row.repetition_penalty != 1 || row.frequency_penalty != 0 || row.presence_penalty != 0;
}

// INVALID_ARGUMENT for ids beyond the vocabulary and lists that are too long.
absl::Status CheckHistory(const DrawHistory& history, int64_t vocab);

// Writes DrawStateBytes(vocab) bytes to `out`. REQUIRES: CheckHistory() is OK.
void WriteDrawState(const DrawHistory& history, int64_t vocab, kernels::DrawState* out);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_DRAW_STATE_H_
