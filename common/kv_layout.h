// Address arithmetic of the KV cache, in one place: used by the worker, the KV store, the CPU kernels
// and (as plain host/device code) the CUDA kernels. Nothing else multiplies a head by a stride.
//
// An extent (and a resident copy, a ring tile, a tail) holds `capacity_tokens` positions of some KV
// heads side by side:
//
//   kv_head 0: [K: capacity x head_dim][V: capacity x head_dim]
//   kv_head 1: [K: capacity x head_dim][V: capacity x head_dim]  ...
//
// all bfloat16, so that any contiguous range of heads is one contiguous piece for a copy engine.
// docs/segment.md states the same as bytes.
#ifndef HEADROOM_COMMON_KV_LAYOUT_H_
#define HEADROOM_COMMON_KV_LAYOUT_H_

#include <cstdint>

#if defined(__CUDACC__)
#define HEADROOM_HOST_DEVICE __host__ __device__
#else
#define HEADROOM_HOST_DEVICE
#endif

namespace headroom {

// Sealing, prefix hashes and attention blocks: a block of 64 keys always lies in one place.
inline constexpr int64_t kBlockTokens = 64;
// Attention folds units at fixed absolute positions [256 u, 256 (u + 1)) from left to right, so that
// its bits depend neither on where keys lie nor on how the prompt was cut into chunks.
inline constexpr int64_t kUnitTokens = 256;
// Rows of the tail ring of one sequence: position p lives in row p % kTailTokens.
inline constexpr int64_t kTailTokens = 256;
// An extent holds at most this many bytes over all its heads (HARDWARE.md's best piece for one copy).
inline constexpr int64_t kMaxExtentBytes = int64_t{16} << 20;
// A bfloat16 value.
inline constexpr int64_t kKvElementBytes = 2;

// What must agree for two processes to read each other's KV.
struct KvGeometry {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;  // of this shard
  int32_t head_dim = 0;

  friend HEADROOM_HOST_DEVICE bool operator==(const KvGeometry& a, const KvGeometry& b) {
    return a.num_layers == b.num_layers && a.num_kv_heads == b.num_kv_heads &&
           a.head_dim == b.head_dim;
  }

  // Bytes of K and V of one position of one KV head of one layer.
  HEADROOM_HOST_DEVICE int64_t BytesPerTokenPerHead() const {
    return 2 * head_dim * kKvElementBytes;
  }
  // ... of all KV heads of one layer: what one extent spends per token.
  HEADROOM_HOST_DEVICE int64_t BytesPerTokenPerLayer() const {
    return BytesPerTokenPerHead() * num_kv_heads;
  }
  // ... of all layers.
  HEADROOM_HOST_DEVICE int64_t BytesPerToken() const {
    return BytesPerTokenPerLayer() * num_layers;
  }
  // The largest capacity (a power of two times kBlockTokens) whose extent is within kMaxExtentBytes;
  // at least one block.
  HEADROOM_HOST_DEVICE int64_t MaxExtentTokens() const {
    int64_t tokens = kBlockTokens;
    while (2 * tokens * BytesPerTokenPerLayer() <= kMaxExtentBytes) tokens *= 2;
    return tokens;
  }
};

// Where heads, K rows and V rows lie in one run of `capacity_tokens` positions.
struct KvLayout {
  int64_t capacity_tokens = 0;
  int32_t head_dim = 0;

  HEADROOM_HOST_DEVICE int64_t RowBytes() const { return head_dim * kKvElementBytes; }
  HEADROOM_HOST_DEVICE int64_t HeadBytes() const { return 2 * capacity_tokens * RowBytes(); }
  HEADROOM_HOST_DEVICE int64_t KeyOffset(int64_t kv_head, int64_t row) const {
    return kv_head * HeadBytes() + row * RowBytes();
  }
  HEADROOM_HOST_DEVICE int64_t ValueOffset(int64_t kv_head, int64_t row) const {
    return kv_head * HeadBytes() + (capacity_tokens + row) * RowBytes();
  }
  HEADROOM_HOST_DEVICE int64_t BytesFor(int64_t num_kv_heads) const {
    return num_kv_heads * HeadBytes();
  }
};

// The capacity of the next extent of a sequence that already has `have_tokens` of capacity and will
// need at least `need_tokens` more: doubling keeps the waste under half, and a prompt of known length
// gets full-size extents at once. `have_tokens` must be a multiple of kBlockTokens.
HEADROOM_HOST_DEVICE inline int64_t NextExtentTokens(const KvGeometry& geometry,
                                                     int64_t have_tokens, int64_t need_tokens) {
  const int64_t largest = geometry.MaxExtentTokens();
  int64_t tokens = kBlockTokens;
  while (tokens < largest && (2 * tokens <= have_tokens || 2 * tokens <= need_tokens)) tokens *= 2;
  return tokens;
}

HEADROOM_HOST_DEVICE inline int64_t FloorToBlock(int64_t tokens) {
  return tokens / kBlockTokens * kBlockTokens;
}
HEADROOM_HOST_DEVICE inline int64_t CeilToBlock(int64_t tokens) {
  return FloorToBlock(tokens + kBlockTokens - 1);
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_KV_LAYOUT_H_
