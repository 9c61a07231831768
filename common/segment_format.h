// The segment as bytes: what a KV store and the processes that map its files agree on.
// docs/segment.md shows the same as tables.
//
// A segment is a folder with three kinds of files:
//   index                a header and a descriptor per extent; written by the store only
//   data                 the extents' keys and values (common/kv_layout.h); a worker writes what it
//                        seals, the store and the worker read
//   mailbox-<G>-<N>      made by the worker for store generation G, its N-th; for attending in place
// The store holds an flock on the folder as long as it lives. No file is ever truncated: one that does
// not fit is unlinked and made anew, so that whoever has the old one mapped reads old bytes, and never
// gets SIGBUS.
//
// Everything is little-endian; places are byte offsets, never pointers. Words that one process writes
// while another reads are 8 bytes, aligned, and accessed by LoadAcquire and StoreRelease.
#ifndef HEADROOM_COMMON_SEGMENT_FORMAT_H_
#define HEADROOM_COMMON_SEGMENT_FORMAT_H_

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "common/kv_layout.h"

namespace headroom {

static_assert(std::endian::native == std::endian::little, "the segment's files are little-endian");

inline constexpr char kIndexFile[] = "index";
inline constexpr char kDataFile[] = "data";
inline constexpr char kMailboxPrefix[] = "mailbox-";

// The name, in the segment's folder, of the `serial`-th mailbox that a worker makes for a generation of
// the store. A mailbox whose wait has timed out is left to the late store, and the next one is made.
inline std::string MailboxFile(uint64_t generation, uint64_t serial) {
  return kMailboxPrefix + std::to_string(generation) + "-" + std::to_string(serial);
}

inline constexpr std::array<char, 8> kIndexMagic = {'H', 'D', 'R', 'M', 'I', 'N', 'D', 'X'};
inline constexpr uint32_t kSegmentFormatVersion = 3;

// Data is pinned in pieces of this size, and a copy across two pinned ranges fails: no extent crosses a
// multiple of it.
inline constexpr int64_t kRegistrationBytes = int64_t{1} << 30;

// How keys and values are stored. 0: no model is bound.
inline constexpr uint32_t kUnbound = 0;
inline constexpr uint32_t kEncodingBFloat16 = 1;

// 2^40 positions: beyond any context, and far from overflow in int64.
inline constexpr int64_t kMaxPositions = int64_t{1} << 40;

// The start of the index file.
struct IndexHeader {
  // ---- Fixed until the store binds another model or makes new files.
  std::array<char, 8> magic;
  uint32_t format_version;
  uint32_t header_bytes;
  uint32_t descriptor_bytes;
  uint32_t max_extents;
  uint64_t data_bytes;
  // The data file belongs to this index if its inode is this one, and its bytes are those that were
  // written if the machine has not been started since.
  uint64_t data_inode;
  std::array<uint8_t, 16> boot_id;
  uint32_t encoding;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  // The shard: layers and KV heads from here on.
  int32_t first_layer;
  int32_t first_kv_head;
  std::array<uint8_t, 16> fingerprint;
  uint64_t reserved[3];
  // XXH3-64 of the bytes before it. 0 while they are being written: release after them, acquire before.
  uint64_t checksum;

  // ---- Written at any time.
  // Changes with every start of the store.
  uint64_t generation;
  // Bytes [0, ready_bytes) of the data file are backed by memory. Rises; extents lie below it.
  uint64_t ready_bytes;
  uint8_t reserved_tail[4096 - 144];
};

// One extent, in a cache line of its own.
struct ExtentDescriptor {
  // 0: free, and the rest means nothing. Else the checksum of the bytes from sequence_id to layer, made
  // odd so that it is never 0: release after them, acquire before. What a store that died in between
  // has left is therefore free, or whole.
  uint64_t commit;
  uint64_t sequence_id;
  int64_t first_pos;
  uint64_t data_offset;
  uint64_t bytes;
  uint32_t capacity_tokens;
  uint32_t layer;  // of the shard
  // Positions of the extent whose keys are sealed, in the low half; their complement in the high half.
  // Release after the keys were written, acquire before they are read.
  uint64_t sealed;
  // 0: the extent has its place in the data. Equal to `commit`: it was given back, data_offset and bytes
  // say where it lay. One word, so that a store that dies has either given it back or not.
  uint64_t vacated;
};

static_assert(std::is_trivially_copyable_v<IndexHeader> && std::is_standard_layout_v<IndexHeader>);
static_assert(sizeof(IndexHeader) == 4096 && alignof(IndexHeader) == 8);
static_assert(offsetof(IndexHeader, magic) == 0);
static_assert(offsetof(IndexHeader, format_version) == 8);
static_assert(offsetof(IndexHeader, header_bytes) == 12);
static_assert(offsetof(IndexHeader, descriptor_bytes) == 16);
static_assert(offsetof(IndexHeader, max_extents) == 20);
static_assert(offsetof(IndexHeader, data_bytes) == 24);
static_assert(offsetof(IndexHeader, data_inode) == 32);
static_assert(offsetof(IndexHeader, boot_id) == 40);
static_assert(offsetof(IndexHeader, encoding) == 56);
static_assert(offsetof(IndexHeader, num_layers) == 60);
static_assert(offsetof(IndexHeader, num_kv_heads) == 64);
static_assert(offsetof(IndexHeader, head_dim) == 68);
static_assert(offsetof(IndexHeader, first_layer) == 72);
static_assert(offsetof(IndexHeader, first_kv_head) == 76);
static_assert(offsetof(IndexHeader, fingerprint) == 80);
static_assert(offsetof(IndexHeader, reserved) == 96);
static_assert(offsetof(IndexHeader, checksum) == 120);
static_assert(offsetof(IndexHeader, generation) == 128);
static_assert(offsetof(IndexHeader, ready_bytes) == 136);
static_assert(offsetof(IndexHeader, reserved_tail) == 144);

static_assert(std::is_trivially_copyable_v<ExtentDescriptor> &&
              std::is_standard_layout_v<ExtentDescriptor>);
static_assert(sizeof(ExtentDescriptor) == 64 && alignof(ExtentDescriptor) == 8);
static_assert(offsetof(ExtentDescriptor, commit) == 0);
static_assert(offsetof(ExtentDescriptor, sequence_id) == 8);
static_assert(offsetof(ExtentDescriptor, first_pos) == 16);
static_assert(offsetof(ExtentDescriptor, data_offset) == 24);
static_assert(offsetof(ExtentDescriptor, bytes) == 32);
static_assert(offsetof(ExtentDescriptor, capacity_tokens) == 40);
static_assert(offsetof(ExtentDescriptor, layer) == 44);
static_assert(offsetof(ExtentDescriptor, sealed) == 48);
static_assert(offsetof(ExtentDescriptor, vacated) == 56);

inline int64_t IndexBytes(int64_t max_extents) {
  return static_cast<int64_t>(sizeof(IndexHeader)) +
         max_extents * static_cast<int64_t>(sizeof(ExtentDescriptor));
}

// Words in shared memory. (std::atomic_ref would do, but not for what is mapped read-only.)
inline uint64_t LoadAcquire(const uint64_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}
inline void StoreRelease(uint64_t& word, uint64_t value) {
  __atomic_store_n(&word, value, __ATOMIC_RELEASE);
}

// Whose keys a segment holds.
struct SegmentBinding {
  KvGeometry geometry;
  std::array<uint8_t, 16> fingerprint = {};
  int32_t first_layer = 0;
  int32_t first_kv_head = 0;

  friend bool operator==(const SegmentBinding&, const SegmentBinding&) = default;
};

// The checksums as their fields define them.
uint64_t ChecksumOf(const IndexHeader& header);
uint64_t CommitWordOf(const ExtentDescriptor& descriptor);

uint64_t SealedWord(int64_t tokens);
// Nothing if the two halves contradict each other.
std::optional<int64_t> SealedTokens(uint64_t word);

// Whether extents of this geometry can be laid out: positive numbers, one block of one layer within
// kMaxExtentBytes. What comes from a file or a peer is asked this first.
bool IsUsable(const KvGeometry& geometry);

}  // namespace headroom

#endif  // HEADROOM_COMMON_SEGMENT_FORMAT_H_
