// A step as the executor sees it: plain data, made from the coordinator's message and back.
#ifndef HEADROOM_SERVICES_WORKER_STEP_H_
#define HEADROOM_SERVICES_WORKER_STEP_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/kv_layout.h"
#include "kernels/sample.h"
#include "services/worker/plan.h"

namespace headroom {

// The extents of all layers for one run of positions.
struct Run {
  int64_t first_pos = 0;
  int64_t capacity_tokens = 0;
  // Per layer, into the segment's data file; kVacated where the layer's window has passed the run and the
  // store has another's keys there.
  std::vector<int64_t> data_offsets;

  static constexpr int64_t kVacated = -1;
};

// What the draws of a sequence go by beside the logits (kernels/sample.h).
struct DrawHistory {
  std::vector<int32_t> prompt_token_ids;
  std::vector<int32_t> drawn_token_ids;  // the answer so far
  int64_t known_tokens = 0;              // prompt and answer so far
  std::vector<kernels::TokenBias> bias;
  std::vector<int32_t> held_back_token_ids;
  int64_t held_back_end = 0;
};

struct OpenSequence {
  uint64_t sequence_id = 0;
  std::vector<Run> runs;
  int64_t sealed_tokens = 0;
  std::optional<DrawHistory> history = std::nullopt;
};

struct RunGrant {
  uint64_t sequence_id = 0;
  Run run;
};

// What one sequence does in a step: its positions [first_pos, first_pos + num_tokens()).
struct StepSequence {
  uint64_t sequence_id = 0;
  int64_t first_pos = 0;
  std::vector<int32_t> token_ids;  // empty: one token, the last that was drawn
  int64_t sealed_tokens = 0;       // keys below are attended in lanes
  bool draw = false;               // draw a token after the last position
  kernels::SampleRow sampling;     // seed, temperature, ...; where `draw`
  int64_t known_tokens = 0;        // tokens below are final; where `draw`, and there is a history
  int32_t num_top_logprobs = 0;
  std::vector<int32_t> score_token_ids;  // of token i: the log-probability of this id after it

  int64_t num_tokens() const {
    return token_ids.empty() ? 1 : static_cast<int64_t>(token_ids.size());
  }
  int64_t end_pos() const { return first_pos + num_tokens(); }
  int64_t num_results() const {
    return static_cast<int64_t>(score_token_ids.size()) + (draw ? 1 : 0);
  }
};

struct LaneAccount {
  double kv_heads = 0;  // mean per layer
  int64_t bytes = 0;
  int64_t busy_ns = 0;
  int64_t idle_ns = 0;
};

struct StepResult {
  absl::Status status;
  // The step was discarded: what it was to do may be submitted anew, with its tokens named.
  bool retry = false;
  // Scored tokens, then the drawn one, for each sequence in the order of the step.
  std::vector<kernels::SampleResult> tokens;
  LaneAccount lanes[kNumLanes];
  int64_t duration_ns = 0;
  int64_t fetch_wait_ns = 0;
  int64_t in_place_wait_ns = 0;
  int64_t sealed_bytes = 0;
};

struct Step {
  uint64_t stream = 0;  // the worker's count of step streams: an answer goes to its own stream only
  uint64_t number = 0;
  uint32_t attempt = 0;
  uint64_t plan_version = 0;
  std::vector<uint64_t> close;
  std::vector<OpenSequence> open;
  std::vector<RunGrant> grants;
  std::vector<StepSequence> sequences;

  StepResult result;

  int64_t num_rows() const {
    int64_t rows = 0;
    for (const StepSequence& sequence : sequences) rows += sequence.num_tokens();
    return rows;
  }
  // Steps with a chunk run in the prefill context, the others in the decode context.
  bool has_chunk() const {
    return std::any_of(sequences.begin(), sequences.end(),
                       [](const StepSequence& s) { return s.num_tokens() > 1; });
  }
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_H_
