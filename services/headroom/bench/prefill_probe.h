// A prefill, chunk by chunk, two in flight; beside it, if wanted, another sequence's decode steps.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_PREFILL_PROBE_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_PREFILL_PROBE_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/worker/decode_probe.h"

namespace headroom {

// A chunk of a prefill has been computed: tokens so far, seconds since the first was submitted.
using OnChunk = std::function<absl::Status(int64_t tokens, double seconds)>;

struct PrefillWork {
  uint64_t plan_version = 0;
  OpenSequence sequence;  // with runs for all positions; its id must be free
  int64_t context_tokens = 0;
  int64_t chunk_tokens = 0;  // a multiple of kBlockTokens
  int32_t vocab = 0;
  absl::Time deadline;  // no chunk begins after it, but for the first
  std::function<absl::Status(int64_t tokens)> await;  // until positions [0, tokens) have host memory
  OnChunk on_chunk;                                   // may be empty
  // Decodes two steps deep as long as the prefill runs, but no more than `most_beside` steps. Opened.
  DecodeSteps* beside = nullptr;
  int64_t most_beside = 0;
};

// Sums over the chunks' steps; with a decode beside them, over the decode's instead.
struct PrefillTimes : StepTimes {
  double seconds = 0;
  int64_t prefilled_tokens = 0;
  std::vector<double> token_seconds;  // between tokens beside the prefill, in order of time
};

absl::StatusOr<PrefillTimes> MeasurePrefill(const PrefillWork& work, const StepPort& port);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_PREFILL_PROBE_H_
