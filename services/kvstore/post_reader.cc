#include "services/kvstore/post_reader.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/checked_math.h"
#include "common/kv_layout.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom::kvstore {
namespace {

// 16 MiB: a pass of 1M keys of a head for Llama-3-8B's four rows is 8.5 MB.
constexpr int64_t kScratchFloats = int64_t{1} << 22;
static_assert(kScratchFloats >= kernels::kMinAttendScratchFloats);

absl::Status Hostile(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("mailbox: ", what));
}

}  // namespace

PostReader::PostReader(const uint8_t* data, std::function<int64_t()> ready_bytes)
    : data_(data),
      ready_bytes_(std::move(ready_bytes)),
      scratch_(std::make_unique<float[]>(kScratchFloats)) {
  items_.reserve(4096);
  spans_.reserve(16384);
}

absl::Status PostReader::Read(const Mailbox& mailbox, uint32_t slot) {
  const MailboxShape& shape = mailbox.shape();
  std::memcpy(&post_, &mailbox.slot(slot).post, sizeof(post_));
  bytes_ = 0;
  if (post_.rows < 1 || post_.rows > shape.max_rows) return Hostile("rows");
  if (post_.layer >= static_cast<uint32_t>(shape.geometry.num_layers)) return Hostile("layer");
  if (post_.table >= shape.tables_per_slot) return Hostile("table");
  if (!std::isfinite(post_.scale)) return Hostile("scale");
  const int32_t d = shape.geometry.head_dim;
  if (d != 64 && d != 128 && d != 256) return absl::UnimplementedError("mailbox: the head size");
  if (!std::isfinite(post_.soft_cap) || post_.soft_cap < 0) return Hostile("soft_cap");
  if (post_.window < 0) return Hostile("window");
  HEADROOM_RETURN_IF_ERROR(ReadItems(mailbox, mailbox.table(slot, post_.table)));
  args_ = kernels::AttendArgs();
  args_.q = mailbox.queries(slot);
  args_.q_stride = shape.query_floats();
  args_.state = mailbox.partials(slot);
  args_.rows = post_.rows;
  args_.items = {items_.data(), items_.data(), static_cast<int32_t>(items_.size())};
  args_.spans = {spans_.data(), spans_.data(), static_cast<int32_t>(spans_.size())};
  args_.scratch = scratch_.get();
  args_.scratch_floats = kScratchFloats;
  args_.scale = post_.scale;
  args_.soft_cap = post_.soft_cap;
  args_.window = post_.window;
  args_.num_q_heads = shape.num_q_heads;
  args_.num_kv_heads = shape.geometry.num_kv_heads;
  args_.head_dim = d;
  return absl::OkStatus();
}

absl::Status PostReader::ReadItems(const Mailbox& mailbox, const uint8_t* table) {
  const MailboxShape& shape = mailbox.shape();
  MailboxTableHeader header;
  std::memcpy(&header, table, sizeof(header));
  const auto fits = [&](uint64_t offset, uint64_t count, uint64_t bytes) {
    return offset % 8 == 0 && offset + count * bytes <= static_cast<uint64_t>(shape.table_bytes);
  };
  if (!fits(header.items_offset, header.num_items, sizeof(MailboxItem)) ||
      !fits(header.spans_offset, header.num_spans, sizeof(MailboxSpan))) {
    return Hostile("the table's offsets");
  }
  MailboxLayer layer;
  std::memcpy(&layer, table + sizeof(header) + post_.layer * sizeof(layer), sizeof(layer));
  if (uint64_t{layer.item_begin} + layer.item_count > header.num_items) return Hostile("the layer");
  items_.clear();
  spans_.clear();
  taken_.assign(size_t{post_.rows} * shape.geometry.num_kv_heads, false);
  const int64_t ready_bytes = ready_bytes_();
  uint64_t next_span = 0;
  for (uint32_t i = 0; i < layer.item_count; ++i) {
    MailboxItem item;
    std::memcpy(&item, table + header.items_offset + (layer.item_begin + i) * sizeof(item),
                sizeof(item));
    // Each span belongs to one item: however long the lists, the work is that of the table's bytes.
    if (i > 0 && item.span_begin != next_span) return Hostile("spans of several items");
    next_span = uint64_t{item.span_begin} + item.span_count;
    if (next_span > header.num_spans || item.span_count == 0) return Hostile("an item's spans");
    HEADROOM_RETURN_IF_ERROR(AddItem(item, shape));
    for (uint32_t s = 0; s < item.span_count; ++s) {
      MailboxSpan span;
      std::memcpy(&span, table + header.spans_offset + (item.span_begin + s) * sizeof(span),
                  sizeof(span));
      HEADROOM_RETURN_IF_ERROR(AddSpan(span, item, shape.geometry, ready_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status PostReader::AddItem(const MailboxItem& from, const MailboxShape& shape) {
  const int32_t heads = shape.geometry.num_kv_heads;
  const int64_t row_end = int64_t{from.row_begin} + from.row_count;
  if (from.row_begin < 0 || from.row_count < 1 || row_end > int64_t{post_.rows} ||
      from.kv_head_begin < 0 || from.kv_head_begin >= from.kv_head_end ||
      from.kv_head_end > heads || from.first_pos < 0 ||
      from.first_valid_pos < 0 || from.first_valid_pos % kBlockTokens != 0 ||
      !CheckedAdd(from.first_pos, from.row_count).has_value()) {
    return Hostile("an item");
  }
  // Two items may not write one state.
  for (int64_t row = from.row_begin; row < row_end; ++row) {
    for (int32_t head = from.kv_head_begin; head < from.kv_head_end; ++head) {
      auto taken = taken_[row * heads + head];
      if (taken) return Hostile("items that meet");
      taken = true;
    }
  }
  kernels::AttendItem item;
  item.row_begin = from.row_begin;
  item.row_count = from.row_count;
  item.first_pos = from.first_pos;
  item.kv_head_begin = from.kv_head_begin;
  item.kv_head_end = from.kv_head_end;
  item.span_begin = static_cast<int32_t>(spans_.size());
  item.reset = 1;
  items_.push_back(item);
  return absl::OkStatus();
}

absl::Status PostReader::AddSpan(const MailboxSpan& from, const MailboxItem& item,
                                 const KvGeometry& geometry, int64_t ready_bytes) {
  if (from.capacity < kBlockTokens || from.capacity > geometry.MaxExtentTokens() ||
      !std::has_single_bit(static_cast<uint32_t>(from.capacity)) || from.count < 1 ||
      from.count > from.capacity || from.count % kBlockTokens != 0 || from.first_pos < 0 ||
      from.first_pos % kBlockTokens != 0 || from.first_pos >= kMaxPositions ||
      from.first_pos + from.count <= item.first_valid_pos) {
    return Hostile("a span");
  }
  kernels::AttendItem& to = items_.back();
  if (to.span_count > 0 &&
      from.first_pos != spans_.back().first_pos + spans_.back().count) {
    return Hostile("a gap between spans");
  }
  if (from.first_pos + from.count > item.first_pos) return Hostile("keys at and after the queries");
  // The extent must lie in memory that the store has given out.
  if (from.data_offset > static_cast<uint64_t>(ready_bytes) || from.data_offset % 64 != 0 ||
      !RangeFits(static_cast<int64_t>(from.data_offset),
                 from.capacity * geometry.BytesPerTokenPerLayer(), ready_bytes)) {
    return Hostile("an extent leaves the segment");
  }
  kernels::KvSpan span;
  // Attention reads keys only; a span is also a place to write to elsewhere.
  span.base = const_cast<uint8_t*>(data_) + from.data_offset;
  span.origin_pos = from.first_pos;
  span.first_pos = std::max(from.first_pos, item.first_valid_pos);
  span.count = static_cast<int32_t>(from.first_pos + from.count - span.first_pos);
  span.capacity = from.capacity;
  span.kv_head_end = geometry.num_kv_heads;
  spans_.push_back(span);
  ++to.span_count;
  bytes_ += int64_t{span.count} * (item.kv_head_end - item.kv_head_begin) *
            geometry.BytesPerTokenPerHead();
  return absl::OkStatus();
}

}  // namespace headroom::kvstore
