#include "services/worker/tiling.h"

#include <algorithm>

#include "kernels/wide_shape.h"

namespace headroom {
namespace {

// Positions of `heads` heads that fit `max_bytes`, in whole units if one fits, else in blocks.
int64_t TokensThatFit(const KvGeometry& geometry, int64_t heads, int64_t max_bytes) {
  const int64_t tokens = max_bytes / (heads * geometry.BytesPerTokenPerHead());
  return tokens >= kUnitTokens ? tokens / kUnitTokens * kUnitTokens : FloorToBlock(tokens);
}

}  // namespace

void CutIntoTiles(Tiling tiling, int32_t heads_at_once, const KvGeometry& geometry,
                  const Rectangle& fetched, int64_t max_bytes, std::vector<Rectangle>& tiles) {
  const int64_t all_heads = fetched.kv_head_end - fetched.kv_head_begin;
  const int64_t all_tokens = fetched.end_pos - fetched.first_pos;
  if (all_heads <= 0 || all_tokens <= 0) return;
  // Decode: as many heads as allow a unit of tokens. Prefill: as few heads as fill the tile.
  int64_t heads = all_heads;
  if (tiling == Tiling::kPrefill) {
    const int64_t length = std::min(all_tokens, kMaxTileTokens);
    int64_t step = std::min<int64_t>(heads_at_once, all_heads);
    while (step > 1 && TokensThatFit(geometry, step, max_bytes) < kernels::kWidePieceTokens) step /= 2;
    heads = max_bytes / (length * geometry.BytesPerTokenPerHead()) / step * step;
    heads = std::min(std::max(heads, step), all_heads);
  }
  while (heads > 1 && TokensThatFit(geometry, heads, max_bytes) < kUnitTokens) --heads;
  const int64_t tokens = TokensThatFit(geometry, heads, max_bytes);
  const bool by_pieces = tiling == Tiling::kPrefill && tokens >= kernels::kWidePieceTokens;
  for (int64_t head = fetched.kv_head_begin; head < fetched.kv_head_end; head += heads) {
    for (int64_t pos = fetched.first_pos, end; pos < fetched.end_pos; pos = end) {
      end = std::min(pos + tokens, fetched.end_pos);
      // Where attention cuts keys anyway.
      if (by_pieces && end < fetched.end_pos) end -= end % kernels::kWidePieceTokens;
      tiles.push_back({static_cast<int32_t>(head),
                       static_cast<int32_t>(std::min<int64_t>(head + heads, fetched.kv_head_end)),
                       pos, end});
    }
  }
}

}  // namespace headroom
