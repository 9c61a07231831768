// The mailbox as bytes: how a worker asks a KV store to attend to keys where they lie, and how the
// answer comes back, without a call between them. docs/mailbox.md shows the same as tables.
//
// A mailbox is one file in the segment's folder (MailboxFile()), made by the worker for one
// generation of the store and thrown away when a wait has timed out: a store that answers late writes
// where nobody reads. It is
//   MailboxHeader
//   slots of slot_bytes: MailboxSlot, tables, queries, partials
// A slot is one conversation: the worker posts, the store answers, one after the other; contexts of
// the worker that run side by side have a slot each.
//
// One post, in order:
//   worker's host    writes the step's table (what each layer attends to) before it enqueues the step;
//                    a slot has a table for each step that may be in flight
//   worker's device  writes the queries and MailboxSlot::post, then posted.count (release)
//   store            reads posted.count (acquire), the post, the table, the queries, the keys; writes
//                    the partials and MailboxSlot::answer, then answered.count (release)
//   worker's device  reads answered.count (acquire), compares the answer's tag, merges the partials
//
// Everything is little-endian; places are offsets, never pointers. Whatever a side has not written
// itself is hostile input to it.
#ifndef HEADROOM_COMMON_MAILBOX_FORMAT_H_
#define HEADROOM_COMMON_MAILBOX_FORMAT_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace headroom {

inline constexpr std::array<char, 8> kMailboxMagic = {'H', 'D', 'R', 'M', 'M', 'B', 'O', 'X'};
inline constexpr uint32_t kMailboxFormatVersion = 2;

// How queries are stored.
inline constexpr uint32_t kQueriesFloat32 = 1;

// Counts and flags that one process writes and another reads.
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct MailboxHeader {
  // ---- Fixed before the store is told of the file.
  std::array<char, 8> magic;
  uint32_t format_version;
  uint32_t header_bytes;
  uint64_t generation;   // of the store that it was made for
  uint64_t incarnation;  // of the worker that made it
  int32_t num_layers;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  uint32_t num_slots;
  uint32_t tables_per_slot;
  uint32_t max_rows;        // of one post
  uint32_t query_encoding;  // kQueriesFloat32
  uint64_t table_bytes;     // of one table
  uint64_t slot_bytes;
  // 1: whoever posts wakes a store that sleeps. 0: a GPU posts, which can wake nobody; the store
  // looks by itself while a step runs.
  uint32_t poster_wakes;
  uint32_t reserved;
  // XXH3-64 of the bytes before it.
  uint64_t checksum;
  uint8_t reserved_fixed[16];

  // ---- Written by the store, on a cache line of its own.
  alignas(64) std::atomic<uint64_t> attached;  // its generation once it looks at the slots
  std::atomic<uint32_t> store_sleeps;          // 1: it sleeps on `wake`
  // ---- Written by the worker.
  alignas(64) std::atomic<uint32_t> wake;  // rises when a step begins, and with each post of a CPU
  // 1: a wait has given up. The store answers nothing more, the worker waits for nothing more.
  std::atomic<uint32_t> retired;
  alignas(64) uint8_t reserved_tail[4096 - 256];
};

// What is asked: attend to layer `layer` of the step in `table`. Also the tag: an answer is taken only
// if it bears the same one.
struct MailboxPost {
  uint64_t step;
  uint32_t attempt;
  uint32_t layer;
  uint32_t table;  // of the slot
  uint32_t rows;   // queries are [rows][num_q_heads][head_dim]
  float scale;     // of the scores, usually 1 / sqrt(head_dim)
  float soft_cap;  // scores become soft_cap * tanh(score / soft_cap); 0: none
  int64_t window;  // tokens that a row sees, its own among them; 0: all
  uint64_t reserved[3];
};

struct MailboxAnswer {
  uint64_t generation;  // of the store that answers
  uint64_t step;
  uint32_t attempt;
  uint32_t layer;
  uint32_t code;  // 0, or an absl::StatusCode: the post was refused
  uint32_t reserved;
  uint64_t reserved_tail[4];
};

// The start of a slot. Each line has one writer.
struct MailboxSlot {
  alignas(64) std::atomic<uint64_t> posted;  // posts so far: the doorbell
  alignas(64) MailboxPost post;
  alignas(64) std::atomic<uint64_t> answered;  // the count of the latest post that was answered
  alignas(64) MailboxAnswer answer;
  // 1: a worker without a GPU sleeps on the low half of `answered`.
  alignas(64) std::atomic<uint32_t> worker_sleeps;
  alignas(64) uint8_t reserved[192];
};

// A table: MailboxTableHeader, MailboxLayer[num_layers], MailboxItem[], MailboxSpan[].

// What the step has come to so far: zeroed by the worker with the rest of the table, then the store's
// to add to before it answers.
struct MailboxTotals {
  uint64_t bytes;    // of keys and values that were read
  uint64_t busy_ns;  // from a post's being seen to its answer
  uint64_t posts;
  uint64_t reserved;
};
// Where the items and spans begin, from the table's first byte.
struct MailboxTableHeader {
  MailboxTotals totals;
  uint32_t num_items;
  uint32_t num_spans;
  uint32_t items_offset;
  uint32_t spans_offset;
  uint8_t reserved[16];
};

struct MailboxLayer {
  uint32_t item_begin;  // items [item_begin, item_begin + item_count)
  uint32_t item_count;
};

// Rows of one sequence against spans of keys, for some KV heads: one state per row and query head in
// the slot's partials, from empty over all keys of the spans (kernels/attention.h).
struct MailboxItem {
  int32_t row_begin;
  int32_t row_count;
  int64_t first_pos;        // of row_begin; the others follow
  int64_t first_valid_pos;  // keys below are not read: all lie behind the rows' windows
  int32_t kv_head_begin;
  int32_t kv_head_end;
  uint32_t span_begin;
  uint32_t span_count;
};

// The first `count` positions of an extent.
struct MailboxSpan {
  uint64_t data_offset;  // of the extent in the data file
  int64_t first_pos;
  int32_t count;
  int32_t capacity;  // tokens
};

static_assert(sizeof(MailboxHeader) == 4096 && std::is_standard_layout_v<MailboxHeader>);
static_assert(offsetof(MailboxHeader, format_version) == 8);
static_assert(offsetof(MailboxHeader, header_bytes) == 12);
static_assert(offsetof(MailboxHeader, generation) == 16);
static_assert(offsetof(MailboxHeader, incarnation) == 24);
static_assert(offsetof(MailboxHeader, num_layers) == 32);
static_assert(offsetof(MailboxHeader, num_q_heads) == 36);
static_assert(offsetof(MailboxHeader, num_kv_heads) == 40);
static_assert(offsetof(MailboxHeader, head_dim) == 44);
static_assert(offsetof(MailboxHeader, num_slots) == 48);
static_assert(offsetof(MailboxHeader, tables_per_slot) == 52);
static_assert(offsetof(MailboxHeader, max_rows) == 56);
static_assert(offsetof(MailboxHeader, query_encoding) == 60);
static_assert(offsetof(MailboxHeader, table_bytes) == 64);
static_assert(offsetof(MailboxHeader, slot_bytes) == 72);
static_assert(offsetof(MailboxHeader, poster_wakes) == 80);
static_assert(offsetof(MailboxHeader, checksum) == 88);
static_assert(offsetof(MailboxHeader, attached) == 128);
static_assert(offsetof(MailboxHeader, store_sleeps) == 136);
static_assert(offsetof(MailboxHeader, wake) == 192);
static_assert(offsetof(MailboxHeader, retired) == 196);
static_assert(sizeof(MailboxPost) == 64 && sizeof(MailboxAnswer) == 64);
static_assert(offsetof(MailboxPost, attempt) == 8 && offsetof(MailboxPost, layer) == 12);
static_assert(offsetof(MailboxPost, table) == 16 && offsetof(MailboxPost, rows) == 20);
static_assert(offsetof(MailboxPost, scale) == 24 && offsetof(MailboxPost, soft_cap) == 28);
static_assert(offsetof(MailboxPost, window) == 32);
static_assert(offsetof(MailboxAnswer, step) == 8 && offsetof(MailboxAnswer, attempt) == 16);
static_assert(offsetof(MailboxAnswer, layer) == 20 && offsetof(MailboxAnswer, code) == 24);
static_assert(sizeof(MailboxTotals) == 32 && sizeof(MailboxTableHeader) == 64);
static_assert(offsetof(MailboxTableHeader, num_items) == 32);
static_assert(offsetof(MailboxTableHeader, items_offset) == 40);
static_assert(sizeof(MailboxSlot) == 512);
static_assert(offsetof(MailboxSlot, post) == 64 && offsetof(MailboxSlot, answered) == 128);
static_assert(offsetof(MailboxSlot, answer) == 192);
static_assert(offsetof(MailboxSlot, worker_sleeps) == 256);
static_assert(sizeof(MailboxLayer) == 8 && sizeof(MailboxItem) == 40 && sizeof(MailboxSpan) == 24);
static_assert(offsetof(MailboxItem, first_pos) == 8 && offsetof(MailboxItem, first_valid_pos) == 16);
static_assert(offsetof(MailboxItem, kv_head_begin) == 24 && offsetof(MailboxItem, span_begin) == 32);
static_assert(offsetof(MailboxSpan, first_pos) == 8 && offsetof(MailboxSpan, count) == 16);

}  // namespace headroom

#endif  // HEADROOM_COMMON_MAILBOX_FORMAT_H_
