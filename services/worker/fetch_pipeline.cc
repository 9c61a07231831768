#include "services/worker/fetch_pipeline.h"

#include <algorithm>

#include "common/status.h"
#include "common/trace.h"

namespace headroom {

absl::StatusOr<std::unique_ptr<FetchPipeline>> FetchPipeline::Create(Device& device, StreamId copy,
                                                                     StreamId compute, GpuKv& kv,
                                                                     uint8_t* ring, int64_t bytes) {
  auto pipeline = std::unique_ptr<FetchPipeline>(
      new FetchPipeline(device, copy, compute, kv, ring, bytes));
  for (int64_t i = 0; i < kMaxLive; ++i) {
    HEADROOM_ASSIGN_OR_RETURN(const EventId filled, device.CreateEvent());
    HEADROOM_ASSIGN_OR_RETURN(const EventId released, device.CreateEvent());
    pipeline->filled_.push_back(filled);
    pipeline->released_.push_back(released);
  }
  return pipeline;
}

FetchPipeline::FetchPipeline(Device& device, StreamId copy, StreamId compute, GpuKv& kv,
                             uint8_t* ring, int64_t bytes)
    : device_(device),
      copy_(copy),
      compute_(compute),
      kv_(kv),
      ring_(ring),
      bytes_(bytes),
      live_(kMaxLive) {
  tiles_.reserve(4096);
  copies_.reserve(8192);
}

void FetchPipeline::BeginStep(OpAccount* copied, OpAccount* waited) {
  step_serial_ += static_cast<int64_t>(tiles_.size());
  tiles_.clear();
  copies_.clear();
  next_fill_ = next_consume_ = 0;
  copied_ = copied;
  waited_ = waited;
}

int FetchPipeline::AddTile(const GpuKv::Sequence& sequence, int32_t layer, const Rectangle& where) {
  const KvGeometry& geometry = kv_.geometry();
  Tile tile;
  tile.kv_head_begin = where.kv_head_begin;
  tile.kv_head_end = where.kv_head_end;
  tile.first_pos = where.first_pos;
  tile.count = static_cast<int32_t>(where.end_pos - where.first_pos);
  const KvLayout to{tile.count, geometry.head_dim};
  const int32_t heads = where.kv_head_end - where.kv_head_begin;
  tile.bytes = to.BytesFor(heads);
  tile.ring_offset = cursor_ + tile.bytes <= bytes_ ? cursor_ : 0;
  cursor_ = tile.ring_offset + tile.bytes;
  tile.copy_begin = static_cast<int32_t>(copies_.size());
  for (int run = 0; run < static_cast<int>(sequence.runs.size()); ++run) {
    const Run& part = sequence.runs[run];
    const int64_t begin = std::max(part.first_pos, where.first_pos);
    const int64_t end = std::min(part.first_pos + part.capacity_tokens, where.end_pos);
    if (begin >= end) continue;
    const KvLayout from{part.capacity_tokens, geometry.head_dim};
    CopyArgs copy;
    copy.dst = ring_ + tile.ring_offset + to.KeyOffset(0, begin - where.first_pos);
    copy.dst_pitch_bytes = to.HeadBytes() / 2;
    copy.src = kv_.Extent(sequence, run, layer).base +
               from.KeyOffset(where.kv_head_begin, begin - part.first_pos);
    copy.src_pitch_bytes = from.HeadBytes() / 2;
    copy.width_bytes = (end - begin) * from.RowBytes();
    copy.height = 2 * heads;
    copies_.push_back(copy);
  }
  tile.copy_end = static_cast<int32_t>(copies_.size());
  tiles_.push_back(tile);
  return static_cast<int>(tiles_.size()) - 1;
}

kernels::KvSpan FetchPipeline::SpanOf(int index) const {
  const Tile& tile = tiles_[index];
  kernels::KvSpan span;
  span.base = ring_ + tile.ring_offset;
  span.origin_pos = span.first_pos = tile.first_pos;
  span.count = span.capacity = tile.count;
  span.kv_head_begin = tile.kv_head_begin;
  span.kv_head_end = tile.kv_head_end;
  return span;
}

absl::StatusOr<bool> FetchPipeline::MakeRoom(const Tile& tile) {
  const int64_t consumed = step_serial_ + next_consume_;
  // The newest of the live tiles in the way; with it go all that are older.
  int64_t last_in_way = live_head_ - 1;
  for (int64_t i = live_head_; i < live_tail_; ++i) {
    const Live& live = live_[i % kMaxLive];
    if (live.ring_offset < tile.ring_offset + tile.bytes &&
        tile.ring_offset < live.ring_offset + live.bytes) {
      last_in_way = i;
    }
  }
  if (live_tail_ - live_head_ == kMaxLive) last_in_way = std::max(last_in_way, live_head_);
  if (last_in_way < live_head_) return true;
  const int64_t serial = live_[last_in_way % kMaxLive].serial;
  if (serial >= consumed) return false;
  HEADROOM_RETURN_IF_ERROR(device_.Wait(copy_, released_[serial % kMaxLive]));
  live_head_ = last_in_way + 1;
  return true;
}

absl::Status FetchPipeline::Fill(const Tile& tile) {
  const TraceScope trace("fill tile", "bytes", tile.bytes);
  const absl::Status status = device_.CopyEach(
      copy_,
      absl::MakeConstSpan(copies_).subspan(tile.copy_begin, tile.copy_end - tile.copy_begin),
      copied_);
  // A tile that was refused half-way is in flight all the same: Abandon() waits for it.
  const int64_t serial = step_serial_ + next_fill_++;
  live_[live_tail_++ % kMaxLive] = {tile.ring_offset, tile.bytes, serial};
  const absl::Status recorded = device_.Record(copy_, filled_[serial % kMaxLive]);
  return status.ok() ? recorded : status;
}

absl::Status FetchPipeline::Advance() {
  while (next_fill_ < static_cast<int>(tiles_.size())) {
    HEADROOM_ASSIGN_OR_RETURN(const bool room, MakeRoom(tiles_[next_fill_]));
    if (!room) break;
    HEADROOM_RETURN_IF_ERROR(Fill(tiles_[next_fill_]));
  }
  return absl::OkStatus();
}

absl::Status FetchPipeline::BeginConsume(int tile) {
  HEADROOM_RETURN_IF_ERROR(Advance());
  if (tile != next_consume_ || tile >= next_fill_) {
    return absl::InternalError("tiles are not consumed in the order of the ring");
  }
  return device_.Wait(compute_, filled_[(step_serial_ + tile) % kMaxLive], waited_);
}

absl::Status FetchPipeline::EndConsume(int tile) {
  HEADROOM_RETURN_IF_ERROR(
      device_.Record(compute_, released_[(step_serial_ + tile) % kMaxLive]));
  ++next_consume_;
  return Advance();
}

absl::Status FetchPipeline::Abandon() {
  if (next_consume_ < next_fill_) {
    HEADROOM_RETURN_IF_ERROR(
        device_.Wait(compute_, filled_[(step_serial_ + next_fill_ - 1) % kMaxLive]));
  }
  for (; next_consume_ < next_fill_; ++next_consume_) {
    HEADROOM_RETURN_IF_ERROR(
        device_.Record(compute_, released_[(step_serial_ + next_consume_) % kMaxLive]));
  }
  step_serial_ += next_fill_;
  tiles_.clear();
  next_fill_ = next_consume_ = 0;
  return absl::OkStatus();
}

}  // namespace headroom
