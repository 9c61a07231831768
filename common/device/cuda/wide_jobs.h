// How the items of a launch with many rows are cut into calls of a fused attention kernel. Pure
// numbers.
//
// A call takes keys that all its rows see, or a square: the keys of its rows' own positions, row i
// of which sees the first i + 1. So rows are cut into blocks at the first and the last of the
// launch's positions: rows before see none of its keys, rows behind see all; in between a block of
// rows [f, f + n) sees the keys before f as a whole and the square at f.
//
// Keys are cut at multiples of kWidePieceTokens, and where the rows' own keys begin: in every lane
// these come in a span of their own, behind what was fetched or lay on the device. But for windows nothing
// else cuts them, least of all where they lie; so pieces are the same in all lanes whose launches end at
// multiples of kWidePieceTokens.
//
// With a window of w tokens a block has an edge: the keys that its first row sees and its last does not,
// row i all but the first i. Blocks then have at most w rows, so that the edge ends before their own
// positions, and are cut behind the row whose first key is the first behind one of the borders above: so an edge
// lies between two borders, in one launch. (Rows that see from the first key on have no edge, but are cut as
// the others are.)
#ifndef HEADROOM_COMMON_DEVICE_CUDA_WIDE_JOBS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_WIDE_JOBS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"

namespace headroom {

// Items [first_item, first_item + num_items) of a launch that differ in their heads only, which
// follow each other.
struct WideJob {
  int32_t first_item = 0;
  int32_t num_items = 0;
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  int64_t keys_begin = 0;  // the launch's keys
  int64_t keys_end = 0;
  int64_t own_begin = 0;  // where the span with the rows' own keys begins, else keys_end
  int64_t window = 0;     // AttendArgs's
};

struct WideBlock {
  int64_t row = 0;  // of the item
  int64_t rows = 0;
  int64_t edge = 0;        // keys before seen_begin of which row i sees all but the first i
  int64_t seen_begin = 0;  // all rows see the launch's keys from here on
  int64_t seen_end = 0;    // and before this
  bool square = false;     // and then those of their own positions
};

struct WidePiece {
  enum class Of { kAllRows, kEdge, kSquare };
  int64_t begin = 0;
  int64_t count = 0;
  Of of = Of::kAllRows;
};

// Whether an item's spans follow each other without a gap.
inline bool KeysFollow(const kernels::AttendArgs& a, const kernels::AttendItem& item) {
  for (int32_t s = 1; s < item.span_count; ++s) {
    const kernels::KvSpan* const span = a.spans.host + item.span_begin + s;
    if (span->first_pos != span[-1].first_pos + span[-1].count) return false;
  }
  return true;
}

// The job that begins with item `first`; it ends before item `end` at the latest.
inline WideJob JobAt(const kernels::AttendArgs& a, int32_t first, int32_t end) {
  const auto keys_of = [&a](const kernels::AttendItem& item, WideJob& job) {
    if (item.span_count == 0) return;
    const kernels::KvSpan& last = a.spans.host[item.span_begin + item.span_count - 1];
    job.keys_begin = a.spans.host[item.span_begin].first_pos;
    job.keys_end = job.own_begin = last.first_pos + last.count;
    if (job.keys_end > item.first_pos) job.own_begin = last.first_pos;
  };
  const kernels::AttendItem& item = a.items.host[first];
  WideJob job;
  job.first_item = first;
  job.num_items = 1;
  job.kv_head_begin = item.kv_head_begin;
  job.kv_head_end = item.kv_head_end;
  job.window = a.window;
  keys_of(item, job);
  for (int32_t i = first + 1; i < end; ++i) {
    const kernels::AttendItem& next = a.items.host[i];
    WideJob its;
    keys_of(next, its);
    if (next.row_begin != item.row_begin || next.row_count != item.row_count ||
        next.first_pos != item.first_pos || next.reset != item.reset ||
        next.finish != item.finish || next.kv_head_begin != job.kv_head_end ||
        its.keys_begin != job.keys_begin || its.keys_end != job.keys_end ||
        its.own_begin != job.own_begin) {
      break;
    }
    ++job.num_items;
    job.kv_head_end = next.kv_head_end;
  }
  return job;
}

// The first of the borders behind `pos`.
inline int64_t BorderBehind(const WideJob& job, int64_t pos) {
  constexpr int64_t kPiece = kernels::kWidePieceTokens;
  int64_t behind = pos < 0 ? 0 : (pos / kPiece + 1) * kPiece;
  for (const int64_t border : {job.keys_begin, job.own_begin, job.keys_end}) {
    if (border > pos) behind = std::min(behind, border);
  }
  return behind;
}

// Calls f(block) for an item's rows in blocks of at most `most` rows, until one is not OK.
template <typename F>
auto ForEachBlock(const kernels::AttendItem& item, const WideJob& job, int64_t most, F&& f)
    -> decltype(f(WideBlock())) {
  const bool keys = job.keys_end > job.keys_begin;
  const auto row_at = [&item](int64_t pos) {
    return std::clamp<int64_t>(pos - item.first_pos, 0, item.row_count);
  };
  const int64_t first_in = keys ? row_at(job.keys_begin) : item.row_count;
  const int64_t first_behind = keys ? row_at(job.keys_end) : item.row_count;
  for (int64_t row = 0; row < item.row_count;) {
    const bool in = row >= first_in && row < first_behind;
    const int64_t end = row < first_in ? first_in : in ? first_behind : item.row_count;
    WideBlock block;
    block.row = row;
    block.rows = std::min(most, end - row);
    block.square = in;
    block.seen_begin = job.keys_begin;
    block.seen_end = row < first_in ? job.keys_begin : in ? item.first_pos + row : job.keys_end;
    if (job.window > 0) {
      const int64_t pos = item.first_pos + row;
      const int64_t first_seen = pos - job.window + 1;
      block.rows = std::min({block.rows, job.window,
                             BorderBehind(job, first_seen) - first_seen + 1});
      if (first_seen >= job.keys_begin) {
        block.seen_begin = std::min(first_seen + block.rows - 1, block.seen_end);
        block.edge = std::max<int64_t>(0, block.seen_begin - first_seen);
      }
    }
    if (auto status = f(block); !status.ok()) return status;
    row += block.rows;
  }
  return {};
}

// Calls f(piece) for the keys that a block of rows sees, in the order of positions, until one is
// not OK.
template <typename F>
auto ForEachPiece(const WideJob& job, const WideBlock& block, F&& f)
    -> decltype(f(WidePiece())) {
  using Of = WidePiece::Of;
  if (block.edge > 0) {
    const WidePiece edge = {block.seen_begin - block.edge, block.edge, Of::kEdge};
    if (auto status = f(edge); !status.ok()) return status;
  }
  for (int64_t pos = block.seen_begin; pos < block.seen_end;) {
    int64_t end = (pos / kernels::kWidePieceTokens + 1) * kernels::kWidePieceTokens;
    if (pos < job.own_begin) end = std::min(end, job.own_begin);
    end = std::min(end, block.seen_end);
    if (auto status = f(WidePiece{pos, end - pos, Of::kAllRows}); !status.ok()) return status;
    pos = end;
  }
  if (!block.square) return {};
  return f(WidePiece{block.seen_end, block.rows, Of::kSquare});
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_WIDE_JOBS_H_
