// What goes into the next step. Pure numbers.
//
// Two kinds of steps run side by side on the worker: a chunk of one prompt, and single tokens of
// all sequences that have one to give. The worker keeps two of each kind in flight, so a sequence's
// next token goes out before the one before it has been drawn ('the last drawn').
#ifndef HEADROOM_SERVICES_COORDINATOR_BATCH_H_
#define HEADROOM_SERVICES_COORDINATOR_BATCH_H_

#include <cstdint>
#include <optional>
#include <vector>

namespace headroom::coordinator {

// The worker's limits.
struct StepLimits {
  int64_t max_chunk_tokens = 0;
  int64_t max_decode_rows = 0;
  int64_t max_results = 0;
};

// What a running sequence stands at.
struct SequenceProgress {
  int64_t known_tokens = 0;  // ids known: prompt and what was drawn and has returned
  int64_t prompt_tokens = 0;
  int64_t next_pos = 0;          // first position that no step has been sent for
  int64_t end_pos = 0;           // positions from here on are never computed
  int64_t sealed_tokens = 0;     // by steps that have returned
  int64_t committed_tokens = 0;  // of these, what the store has acknowledged
  int64_t tail_begin = 0;        // keys below are not in the tail any more
  int64_t capacity_tokens = 0;   // of the extents
  int64_t chunk_tokens = 0;      // most that the request wants in one chunk
  bool draws = true;             // tokens are to be generated
  bool scores = false;           // prompt tokens are to be scored
  bool chunk_in_flight = false;
  bool may_run = true;  // its client takes what it gets, its plan is ready
};

// Positions [first_pos, first_pos + count) of one sequence.
struct Piece {
  int64_t first_pos = 0;
  int64_t count = 0;
  bool last_drawn = false;    // the one token is not known yet
  bool draw = false;          // draw a token after the last position
  int64_t num_scores = 0;     // score what follows the first num_scores positions
  int64_t sealed_tokens = 0;  // keys below are attended in lanes

  int64_t end_pos() const { return first_pos + count; }
};

// What the sequence can do next, or nothing.
std::optional<Piece> NextPiece(const SequenceProgress& progress, const StepLimits& limits);

// The sequence after a step with `piece` has been sent.
void Advance(SequenceProgress& progress, const Piece& piece);

struct BatchEntry {
  int index = 0;  // into the sequences
  Piece piece;
};

// The next step of single tokens. A sequence whose chunk is in flight joins only if it is alone:
// the step would wait for the chunk, and all others with it. Beyond the worker's rows, those after
// `first_index` come first, so that turns go round.
std::vector<BatchEntry> ComposeTokenStep(const std::vector<SequenceProgress>& sequences,
                                         const StepLimits& limits, int first_index);

// The next chunk: of the first sequence that has one. At most one entry.
std::vector<BatchEntry> ComposeChunkStep(const std::vector<SequenceProgress>& sequences,
                                         const StepLimits& limits);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_BATCH_H_
