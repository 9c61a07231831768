// Attention of items with many rows, as a library's fused kernel computes it: which shapes it is
// called with, and what memory that takes.
//
// A call takes `rows` rows of `heads` KV heads (all their query heads) against one piece of keys.
// Its shapes are planned when the device starts, so there must be few of them, and a call should
// fill a large GPU whether an item has few rows and many heads or the reverse. So a class is a
// product rows x heads of one volume: with 128 queries to a block of threads, kWideQueries queries
// are 256 blocks, two waves on the 132 multiprocessors of an H100. Buffers have one size for all
// classes; for Llama-3-8B a partial's are 8 MiB.
//
// A square, whose rows see more and more keys, keeps multiprocessors waiting for its last blocks: one
// head of 8,192 rows took 0.21 ms at an H100's base clock, 330 TFLOP/s. So its call takes more heads:
// Llama-3-8B's prefill of 32K tokens went from 1,316 to 1,275 ms.
//
// Where rows see a window, the keys that only the first of them see are a square too, with rows and
// keys backwards: row i misses the first i.
//
// Keys are cut at multiples of kWidePieceTokens absolute positions, wherever they lie.
#ifndef HEADROOM_KERNELS_WIDE_SHAPE_H_
#define HEADROOM_KERNELS_WIDE_SHAPE_H_

#include <bit>
#include <cstdint>

namespace headroom::kernels {

// Items with fewer rows leave most of a call's queries unused: a call over 4,096 keys takes two
// waves of some 54 us whatever is in it, and our own kernels, at 100 TFLOP/s, about as long for 128
// rows of 32 query heads.
inline constexpr int64_t kWideRows = 128;
// Blocks of rows are no longer than their window, and each takes two squares: 8,192 rows of Llama-3-8B's
// heads with a window of 4,096 take 1.28 ms on an H200 (by our own kernels 9.8), with one of 512 1.48
// (1.95).
inline constexpr int64_t kWideWindow = 512;
// Longer pieces cost fewer calls and folds: 8,192 rows of Llama-3-8B's heads on 32,768 keys take 6.5 ms on an
// H200, with pieces of 4,096 6.9. Shorter ones let lanes share more borders.
inline constexpr int64_t kWidePieceTokens = 8192;
// Partials that are folded at once: a fold reads and writes the float32 state, 1,024 of its 1,280
// bytes a query if it took one partial only.
inline constexpr int32_t kWidePartials = 4;
inline constexpr int64_t kWideQueries = 32768;
inline constexpr int32_t kMaxWideHeads = 16;
// Times the heads of a piece's call, if there are as many: the heads of a square's.
inline constexpr int32_t kWideSquare = 8;
// Pieces of different heads go in so many lanes side by side, each with buffers and a stream of its own:
// a call of 256 blocks leaves multiprocessors one by one, and the next begins when all are done. With
// one lane Llama-3-8B's prefill of 128K tokens took 11.35 s on an H100, with two 10.97 s.
inline constexpr int32_t kWideLanes = 2;
// What a planned call may take for itself (cuDNN 9.14 takes 256 bytes on an H100).
inline constexpr int64_t kWideWorkspaceBytes = int64_t{1} << 20;
inline constexpr int64_t kWideLengthsBytes = 256;

// Of a model, or its part on this device.
struct WideShape {
  int64_t max_rows = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float soft_cap = 0;     // of scores, as AttendArgs has it
  bool windowed = false;  // some layers have a window

  constexpr int32_t group() const { return num_q_heads / num_kv_heads; }
};

struct WideClass {
  int64_t rows = 0;
  int32_t heads = 0;         // KV heads of a piece's call
  int32_t square_heads = 0;  // of a square's, a multiple of `heads`
};

// The classes of a shape: `heads` is a power of two from least_heads to most_heads, and
// rows x heads = volume.
struct WideClasses {
  int64_t volume = 0;
  int32_t least_heads = 0;
  int32_t most_heads = 0;
  int32_t all_heads = 0;  // the model's, down to a power of two

  constexpr explicit WideClasses(const WideShape& shape) {
    const auto ceil = [](int64_t n) {
      return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
    };
    all_heads = static_cast<int32_t>(std::bit_floor(static_cast<uint32_t>(
        shape.num_kv_heads < kMaxWideHeads ? shape.num_kv_heads : kMaxWideHeads)));
    const int64_t most_rows = ceil(shape.max_rows < kWideRows ? kWideRows : shape.max_rows);
    volume = ceil((kWideQueries + shape.group() - 1) / shape.group());
    if (volume > most_rows * all_heads) volume = most_rows * all_heads;
    least_heads = static_cast<int32_t>(volume > most_rows ? volume / most_rows : 1);
    most_heads = all_heads;
    while (most_heads > least_heads && volume / most_heads < kWideRows) most_heads /= 2;
  }
  constexpr WideClass Of(int32_t heads) const {
    const int32_t square = heads * kWideSquare;
    return {volume / heads, heads, square < all_heads ? square : all_heads};
  }
  // Rows x heads of the largest square.
  constexpr int64_t SquareVolume() const {
    const WideClass of = Of(least_heads);
    return of.rows * of.square_heads;
  }

  // The class for items of `rows` rows: the one with the fewest that has them all, else that with
  // the most. Their heads have no say, so that rows are cut alike in all lanes: where an item has
  // fewer heads than the class the rest of a call is computed for nothing.
  constexpr WideClass For(int64_t rows) const {
    int32_t heads = most_heads;
    while (heads > least_heads && volume / heads < rows) heads /= 2;
    return Of(heads);
  }
};

// Where the buffers of a call lie in scratch, as bytes; each begins at a multiple of 256.
struct WideLayout {
  int64_t partial_bytes = 0;  // o of one partial: [query heads of a class][rows][head_dim] bfloat16
  int64_t lse_bytes = 0;      // [query heads of a class][rows] float32
  int64_t q = 0;              // [query heads of a square][rows][head_dim] bfloat16
  int64_t o = 0;              // [lane][kWidePartials] partials
  int64_t lse = 0;            // [lane][kWidePartials]
  int64_t square_o = 0;       // as q
  int64_t square_lse = 0;     // [query heads of a square][rows]
  int64_t edge_o = 0;         // likewise, where there are windows
  int64_t edge_lse = 0;
  int64_t keys = 0;  // [heads of a square][rows][head_dim], or [lane] of pieces
  int64_t values = 0;
  int64_t piece_bytes = 0;  // keys of a piece: [heads][kWidePieceTokens][head_dim]
  int64_t lengths = 0;      // [lane] 256 bytes, of which two int32
  int64_t workspace = 0;    // [lane][kWideWorkspaceBytes]
  int64_t bytes = 0;

  constexpr explicit WideLayout(const WideShape& shape) {
    const WideClasses classes(shape);
    constexpr int64_t kElement = 2;
    const auto take = [this](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    const int64_t queries = classes.volume * shape.group();
    const int64_t squares = classes.SquareVolume() * shape.group();
    piece_bytes = kWidePieceTokens * classes.most_heads * shape.head_dim * kElement;
    const int64_t square_bytes = classes.SquareVolume() * shape.head_dim * kElement;
    const int64_t key_bytes =
        kWideLanes * piece_bytes > square_bytes ? kWideLanes * piece_bytes : square_bytes;
    partial_bytes = queries * shape.head_dim * kElement;
    lse_bytes = queries * static_cast<int64_t>(sizeof(float));
    q = take(squares * shape.head_dim * kElement);
    o = take(kWideLanes * kWidePartials * partial_bytes);
    lse = take(kWideLanes * kWidePartials * lse_bytes);
    square_o = take(squares * shape.head_dim * kElement);
    square_lse = take(squares * static_cast<int64_t>(sizeof(float)));
    const int64_t edges = shape.windowed ? squares : 0;
    edge_o = take(edges * shape.head_dim * kElement);
    edge_lse = take(edges * static_cast<int64_t>(sizeof(float)));
    keys = take(key_bytes);
    values = take(key_bytes);
    lengths = take(kWideLanes * kWideLengthsBytes);
    workspace = take(kWideLanes * kWideWorkspaceBytes);
  }
};

// How many rows of an item of `rows` rows a call should take. Calls take powers of two, of which the next above a
// window would leave half of the rows empty.
inline constexpr int64_t WideRowsOfCall(int64_t rows, int64_t window) {
  if (window == 0) return rows;
  const auto most = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(window)));
  return rows < most ? rows : most;
}

// KV heads of an item of `rows` rows that all lanes together take at a time; 1 where items are not taken that way.
inline constexpr int32_t WideHeadsAtOnce(const WideShape& shape, int64_t rows, int64_t window) {
  if (rows < kWideRows || shape.max_rows < kWideRows) return 1;
  return WideClasses(shape).For(WideRowsOfCall(rows, window)).heads * kWideLanes;
}

// Floats of scratch with which items of many rows are computed that way; 0 if none can have as
// many.
inline constexpr int64_t WideAttendScratchFloats(const WideShape& shape) {
  if (shape.max_rows < kWideRows) return 0;
  return WideLayout(shape).bytes / static_cast<int64_t>(sizeof(float));
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_WIDE_SHAPE_H_
