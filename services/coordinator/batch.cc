#include "services/coordinator/batch.h"

#include <algorithm>

#include "common/kv_layout.h"

namespace headroom::coordinator {
namespace {

// Keys below may be attended in lanes. A chunk brings what is unsealed along in its own buffer, so it
// names all that earlier steps seal, in flight or not. A single token leaves keys to the tail until the
// store knows that they are sealed. That takes milliseconds, and a block more is left to the tail than
// need be, so that which keys a step reads where does not hang on them. A store that is away for
// longer must not make the tail overflow.
int64_t SealedToName(const SequenceProgress& progress, int64_t first_pos, int64_t count) {
  const int64_t whole_blocks = FloorToBlock(first_pos);
  if (count > 1) return whole_blocks;
  const int64_t acknowledged =
      std::min({progress.sealed_tokens, progress.committed_tokens, whole_blocks - kBlockTokens});
  const int64_t beyond_tail = CeilToBlock(std::max<int64_t>(0, first_pos + 1 - kTailTokens));
  return std::min(whole_blocks, std::max({progress.tail_begin, acknowledged, beyond_tail}));
}

}  // namespace

std::optional<Piece> NextPiece(const SequenceProgress& progress, const StepLimits& limits) {
  if (!progress.may_run || progress.next_pos >= progress.end_pos) return std::nullopt;
  Piece piece;
  piece.first_pos = progress.next_pos;
  const int64_t known = progress.known_tokens - progress.next_pos;
  if (known > 0) {
    piece.count = std::min({known, progress.end_pos - progress.next_pos, limits.max_chunk_tokens,
                            progress.chunk_tokens});
    if (progress.scores) piece.count = std::min(piece.count, limits.max_results - 1);
  } else {
    if (!progress.draws) return std::nullopt;
    piece.count = 1;
    piece.last_drawn = true;
  }
  // What the step finishes must have an extent to go to. A chunk is not cut where it is still to come: then
  // the borders of chunks would hang on when it does.
  if (FloorToBlock(piece.end_pos()) > progress.capacity_tokens) return std::nullopt;
  piece.draw = progress.draws && piece.end_pos() >= progress.known_tokens;
  if (progress.scores) {
    piece.num_scores =
        std::clamp<int64_t>(progress.prompt_tokens - 1 - piece.first_pos, 0, piece.count);
  }
  piece.sealed_tokens = SealedToName(progress, piece.first_pos, piece.count);
  return piece;
}

void Advance(SequenceProgress& progress, const Piece& piece) {
  progress.next_pos = piece.end_pos();
  // A chunk longer than the tail leaves only its unfinished block there.
  if (piece.end_pos() - piece.sealed_tokens > kTailTokens) {
    progress.tail_begin = FloorToBlock(piece.end_pos());
  }
}

std::vector<BatchEntry> ComposeTokenStep(const std::vector<SequenceProgress>& sequences,
                                         const StepLimits& limits, int first_index) {
  std::vector<BatchEntry> step;
  std::vector<BatchEntry> behind_chunks;
  const int count = static_cast<int>(sequences.size());
  for (int i = 0; i < count; ++i) {
    const int index = (first_index + i) % count;
    const std::optional<Piece> piece = NextPiece(sequences[index], limits);
    if (!piece.has_value() || piece->count != 1) continue;
    (sequences[index].chunk_in_flight ? behind_chunks : step).push_back({index, *piece});
  }
  if (step.empty() && behind_chunks.size() == 1) step = behind_chunks;
  // Each row draws or scores at most once, twice where both.
  const int64_t most =
      std::min(limits.max_decode_rows, std::max<int64_t>(1, limits.max_results / 2));
  if (static_cast<int64_t>(step.size()) > most) step.resize(most);
  return step;
}

std::vector<BatchEntry> ComposeChunkStep(const std::vector<SequenceProgress>& sequences,
                                         const StepLimits& limits) {
  for (size_t index = 0; index < sequences.size(); ++index) {
    const std::optional<Piece> piece = NextPiece(sequences[index], limits);
    if (piece.has_value() && piece->count > 1) return {{static_cast<int>(index), *piece}};
  }
  return {};
}

}  // namespace headroom::coordinator
