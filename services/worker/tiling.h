// How fetched keys are cut into tiles. Pure numbers.
//
// A tile is a rectangle of KV heads x positions of one (sequence, layer), staged as
// [kv_head][K | V][positions]. Both tilings fill it with one 2D copy per extent:
// - decode takes extents as they lie: all fetched heads of an extent (of several, while they are
//   small), so that the copy is one contiguous piece of up to 16 MiB;
// - prefill wants tiles long in tokens and narrow in heads: merging a tile costs about 16 us a head
//   on an H100 whatever its length, 16% of the attention at 4,096 tokens and 2% at 32K. But not so narrow
//   that a call of attention is not filled: with tiles of one head of Gemma-2-9B, whose calls take two,
//   131,072 tokens took 12.8 s on an H200, and now take 9.7.
#ifndef HEADROOM_SERVICES_WORKER_TILING_H_
#define HEADROOM_SERVICES_WORKER_TILING_H_

#include <cstdint>
#include <vector>

#include "common/kv_layout.h"

namespace headroom {

enum class Tiling { kDecode, kPrefill };

struct Rectangle {
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  int64_t first_pos = 0;
  int64_t end_pos = 0;
};

// A prefill tile need not be longer than this.
inline constexpr int64_t kMaxTileTokens = int64_t{1} << 17;

// Cuts `fetched` into tiles of at most `max_bytes`, appended to `tiles` in the order in which
// attention takes them: for every head ascending in position. Borders are multiples of kUnitTokens
// where the rectangle begins at one (and of kBlockTokens always); of long prefill tiles multiples of
// kWidePieceTokens wherever it begins, so that a chunk's attention has the same bits over tiles as over resident
// keys. Heads of a prefill tile are a multiple of `heads_at_once`, with which attention takes them, or of the half,
// the quarter ... of it of which a piece fits.
// REQUIRES: borders are multiples of kBlockTokens; max_bytes holds one block of one head.
void CutIntoTiles(Tiling tiling, int32_t heads_at_once, const KvGeometry& geometry,
                  const Rectangle& fetched, int64_t max_bytes, std::vector<Rectangle>& tiles);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_TILING_H_
