// What each layer of a step does: which keys are moved where, and what each launch of attention reads.
#include <algorithm>

#include "services/worker/step_context.h"

namespace headroom {
namespace {

using kernels::AttendItem;
using kernels::CopyKvItem;
using kernels::KvSpan;

enum MoveKind { kPrelude, kSeal, kMirror, kKeep };
enum LaunchKind { kLocal, kTile, kLast, kAfter };

// The span with only positions [begin, end).
KvSpan Clip(KvSpan span, int64_t begin, int64_t end) {
  const int64_t last = std::min(span.first_pos + span.count, end);
  span.first_pos = std::max(span.first_pos, begin);
  span.count = static_cast<int32_t>(std::max<int64_t>(0, last - span.first_pos));
  return span;
}

}  // namespace

KvSpan StepContext::OwnKeys(const Part& part, int32_t layer) const {
  const int64_t end = part.what->end_pos();
  KvSpan span = kv_.Tail(*part.kv, layer);
  if (!part.in_tail) {
    span.base = chunk_buffers_[layer % 2] + part.chunk_offset_bytes;
    span.origin_pos = part.first_own_pos;
    span.capacity = static_cast<int32_t>(CeilToBlock(end - part.first_own_pos));
  }
  span.first_pos = part.first_own_pos;
  span.count = static_cast<int32_t>(end - part.first_own_pos);
  return span;
}

int64_t StepContext::FirstKey(const Part& part, int32_t layer) const {
  return FloorToBlock(kernels::FirstSeen(config_.window(layer), part.what->first_pos));
}

// A long context has a thousand runs, and every head of every layer asks for its first and its last.
int StepContext::FirstRun(const Part& part, int32_t layer) const {
  const int64_t first_key = FirstKey(part, layer);
  const auto& runs = part.kv->runs;
  const auto lies_before = [first_key, sealed = part.what->sealed_tokens](const Run& run) {
    return std::min(sealed, run.first_pos + run.capacity_tokens) <= first_key;
  };
  const auto first = std::partition_point(runs.begin(), runs.end(), lies_before);
  return std::min(static_cast<int>(first - runs.begin()), SealedRuns(part));
}

int StepContext::SealedRuns(const Part& part) const {
  const auto& runs = part.kv->runs;
  const auto is_sealed = [sealed = part.what->sealed_tokens](const Run& run) {
    return run.first_pos < sealed;
  };
  return static_cast<int>(std::partition_point(runs.begin(), runs.end(), is_sealed) - runs.begin());
}

int64_t StepContext::SealedTokens(const Part& part, int run, int64_t from) const {
  const Run& where = part.kv->runs[run];
  const int64_t end = std::min(part.what->sealed_tokens, where.first_pos + where.capacity_tokens);
  return std::max<int64_t>(0, end - std::max(from, where.first_pos));
}

int StepContext::RunsInPlace(const Part& part, int32_t layer, int32_t head) const {
  if (!may_ask_store_) return 0;
  const int runs = SealedRuns(part);
  int run = FirstRun(part, layer);
  while (run < runs && kv_.Resident(*part.kv, run, layer, head).base == nullptr &&
         plan_->LaneOf(layer, head, part.kv->runs[run].first_pos) == Lane::kInPlace) {
    ++run;
  }
  return run;
}

Lane StepContext::LaneOf(const Part& part, int run, int32_t layer, int32_t head) const {
  const size_t index = static_cast<size_t>(&part - parts_.data()) * geometry_.num_kv_heads + head;
  if (run < runs_in_place_[index]) return Lane::kInPlace;
  return kv_.Resident(*part.kv, run, layer, head).base != nullptr ? Lane::kResident
                                                                  : Lane::kFetched;
}

void StepContext::BuildLayer(int32_t layer, StepTables& tables, Flight& flight) {
  runs_in_place_.clear();
  for (const Part& part : parts_) {
    int32_t in_place = 0;
    for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
      runs_in_place_.push_back(RunsInPlace(part, layer, head));
      if (runs_in_place_.back() > 0) ++in_place;
    }
    // The last of them, if too many queries ask.
    const int32_t stay =
        HeadsInPlace(part.what->num_tokens() * group_, fast_queries_, in_place, layer);
    for (auto runs = runs_in_place_.rbegin(); in_place > stay; ++runs) {
      if (*runs == 0) continue;
      *runs = 0;
      --in_place;
    }
  }
  BuildMoves(layer, tables);
  BuildAttention(layer, tables);
  // Lanes by heads: the share of each head's sealed keys, averaged over sequences and layers.
  for (const Part& part : parts_) {
    const double weight =
        1.0 / static_cast<double>(parts_.size()) / static_cast<double>(geometry_.num_layers);
    const int64_t first_key = FirstKey(part, layer);
    const int64_t seen = part.what->sealed_tokens - first_key;
    for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
      if (seen <= 0) flight.kv_heads[static_cast<int>(Lane::kResident)] += weight;
      for (int run = FirstRun(part, layer); run < SealedRuns(part); ++run) {
        flight.kv_heads[static_cast<int>(LaneOf(part, run, layer, head))] +=
            weight * static_cast<double>(SealedTokens(part, run, first_key)) /
            static_cast<double>(seen);
      }
    }
  }
}

void StepContext::BuildMoves(int32_t layer, StepTables& tables) {
  for (auto& scratch : copy_scratch_) scratch.clear();
  append_scratch_.clear();
  for (const Part& part : parts_) {
    const int64_t first = part.what->first_pos;
    const int64_t end = part.what->end_pos();
    const KvSpan own = OwnKeys(part, layer);
    const KvSpan tail = kv_.Tail(*part.kv, layer);
    append_scratch_.push_back({part.row_begin, Clip(own, first, end)});
    if (part.prelude_sealed) {
      for (int run = 0; run < static_cast<int>(part.kv->runs.size()); ++run) {
        const KvSpan from =
            Clip(kv_.Extent(*part.kv, run, layer), part.first_own_pos, first);
        if (from.count <= 0) continue;
        copy_scratch_[kPrelude].push_back(
            {from, Clip(own, from.first_pos, from.first_pos + from.count)});
      }
    } else if (!part.in_tail && first > part.first_own_pos) {
      KvSpan from = tail;
      from.first_pos = part.first_own_pos;
      from.count = static_cast<int32_t>(first - part.first_own_pos);
      copy_scratch_[kPrelude].push_back({from, Clip(own, part.first_own_pos, first)});
    }
    const int64_t seal_begin = FloorToBlock(first);
    const int64_t seal_end = FloorToBlock(end);
    if (!part.in_tail && end > seal_end) {
      KvSpan to = tail;
      to.first_pos = seal_end;
      to.count = static_cast<int32_t>(end - seal_end);
      copy_scratch_[kKeep].push_back({own, to});
    }
    for (int run = 0; seal_begin < seal_end && run < static_cast<int>(part.kv->runs.size());
         ++run) {
      const KvSpan to = Clip(kv_.Extent(*part.kv, run, layer), seal_begin, seal_end);
      if (to.count <= 0) continue;
      copy_scratch_[kSeal].push_back({own, to});
      for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
        const KvSpan copy =
            Clip(kv_.Resident(*part.kv, run, layer, head), seal_begin, seal_end);
        if (copy.base != nullptr) copy_scratch_[kMirror].push_back({own, copy});
      }
    }
  }
  LayerWork& work = layers_[layer];
  work.append = tables.Add(append_scratch_);
  work.prelude = tables.Add(copy_scratch_[kPrelude]);
  work.seal = tables.Add(copy_scratch_[kSeal]);
  work.mirror = tables.Add(copy_scratch_[kMirror]);
  work.keep = tables.Add(copy_scratch_[kKeep]);
  seals_ = seals_ || work.seal.count > 0;
}

void StepContext::BuildAttention(int32_t layer, StepTables& tables) {
  LayerWork& work = layers_[layer];
  for (const int kind : {kLocal, kLast, kAfter}) {
    item_scratch_[kind].clear();
    span_scratch_[kind].clear();
  }
  merge_scratch_.clear();
  if (may_ask_store_) in_place_.BeginLayer();
  work.tile_begin = static_cast<int32_t>(tile_launches_.size());
  for (const Part& part : parts_) {
    // Neighbouring heads whose runs lie alike go together.
    const int first_run = FirstRun(part, layer);
    const int runs = SealedRuns(part);
    const auto alike = [&](int32_t a, int32_t b) {
      for (int run = first_run; run < runs; ++run) {
        if (LaneOf(part, run, layer, a) != LaneOf(part, run, layer, b)) return false;
      }
      return true;
    };
    for (int32_t begin = 0, end; begin < geometry_.num_kv_heads; begin = end) {
      end = begin + 1;
      while (end < geometry_.num_kv_heads && alike(begin, end)) ++end;
      AttendHeads(part, layer, begin, end, tables);
    }
  }
  work.tile_end = static_cast<int32_t>(tile_launches_.size());
  work.local = {tables.Add(item_scratch_[kLocal]), tables.Add(span_scratch_[kLocal])};
  work.last = {tables.Add(item_scratch_[kLast]), tables.Add(span_scratch_[kLast])};
  work.after = {tables.Add(item_scratch_[kAfter]), tables.Add(span_scratch_[kAfter])};
  work.merge = tables.Add(merge_scratch_);
}

// Where the resident keys of a head end that follow `pos`; `most`, which is sealed, at most.
int64_t StepContext::ResidentTo(const Part& part, int32_t layer, int32_t head, int64_t pos,
                                int64_t most) const {
  const auto& runs = part.kv->runs;
  const auto ends_by = [pos](const Run& run) { return run.first_pos + run.capacity_tokens <= pos; };
  auto run = std::partition_point(runs.begin(), runs.end(), ends_by);
  for (; pos < most; ++run) {
    if (LaneOf(part, static_cast<int>(run - runs.begin()), layer, head) != Lane::kResident) break;
    pos = std::min(run->first_pos + run->capacity_tokens, most);
  }
  return pos;
}

// Where the piece ends, in which a chunk's attention takes the key before `end`; a decode step has none.
int64_t StepContext::PieceEnd(int64_t end) const {
  constexpr int64_t kPiece = kernels::kWidePieceTokens;
  return tiling_ == Tiling::kPrefill ? (end + kPiece - 1) / kPiece * kPiece : end;
}

// What the store is asked to attend to: the runs in place of heads that lie alike.
void StepContext::AskStore(const Part& part, int32_t layer, int32_t head_begin, int32_t head_end) {
  mailbox_scratch_.clear();
  for (int run = FirstRun(part, layer); run < SealedRuns(part); ++run) {
    if (LaneOf(part, run, layer, head_begin) != Lane::kInPlace) continue;
    const Run& where = part.kv->runs[run];
    MailboxSpan span;
    span.data_offset = static_cast<uint64_t>(where.data_offsets[layer]);
    span.first_pos = where.first_pos;
    span.count = static_cast<int32_t>(SealedTokens(part, run, where.first_pos));
    span.capacity = static_cast<int32_t>(where.capacity_tokens);
    mailbox_scratch_.push_back(span);
  }
  MailboxItem item = {};
  item.row_begin = part.row_begin;
  item.row_count = static_cast<int32_t>(part.what->num_tokens());
  item.first_pos = part.what->first_pos;
  item.first_valid_pos = FirstKey(part, layer);
  item.kv_head_begin = head_begin;
  item.kv_head_end = head_end;
  in_place_.AddItem(item, mailbox_scratch_);
}

// Heads [head_begin, head_end) of one sequence, whose runs lie in the same lanes. Runs in place go to
// the store. The fetched ones become tiles, and each launch takes the keys since the one before, in
// order of position. Of heads that lie in place as a whole, the launch after the store's answer goes on
// from its states; to others, whatever they are cut into, the answer is added at the end. What lies behind
// the window of all the sequence's rows is nobody's.
void StepContext::AttendHeads(const Part& part, int32_t layer, int32_t head_begin,
                              int32_t head_end, StepTables& tables) {
  const int64_t first_key = FirstKey(part, layer);
  const int first_run = FirstRun(part, layer);
  const int64_t sealed = std::max(part.what->sealed_tokens, first_key);
  const int runs = SealedRuns(part);
  const KvSpan own = Clip(OwnKeys(part, layer), first_key, part.what->end_pos());
  std::fill(progress_.begin(), progress_.end(), first_key);
  // Adds an item of `kind` with the resident keys of [progress of the head, pos), then `more`, then those that
  // are resident behind it, up to `behind`.
  const auto add = [&](LaunchKind kind, int32_t begin, int32_t end, int64_t pos,
                       const KvSpan& more, int64_t behind, bool finish) {
    AttendItem item;
    item.row_begin = part.row_begin;
    item.row_count = static_cast<int32_t>(part.what->num_tokens());
    item.first_pos = part.what->first_pos;
    item.kv_head_begin = begin;
    item.kv_head_end = end;
    item.span_begin = static_cast<int32_t>(span_scratch_[kind].size());
    item.reset = progress_[begin] == first_key ? 1 : 0;
    item.finish = finish ? 1 : 0;
    const auto add_resident = [&](int64_t from, int64_t to) {
      for (int run = first_run; run < runs && from < to; ++run) {
        const KvSpan span = Clip(kv_.Resident(*part.kv, run, layer, begin), from, to);
        if (span.base != nullptr && span.count > 0) span_scratch_[kind].push_back(span);
      }
    };
    add_resident(progress_[begin], pos);
    span_scratch_[kind].push_back(more);
    add_resident(more.first_pos + more.count, behind);
    item.span_count = static_cast<int32_t>(span_scratch_[kind].size()) - item.span_begin;
    item_scratch_[kind].push_back(item);
  };
  // Resident copies lie apart, head by head; without any, all heads are one item.
  const auto add_heads = [&](LaunchKind kind, int32_t begin, int32_t end, int64_t pos,
                             const KvSpan& more, int64_t behind, bool finish) {
    if (progress_[begin] >= pos && behind <= more.first_pos + more.count) {
      add(kind, begin, end, pos, more, behind, finish);
    } else {
      for (int32_t head = begin; head < end; ++head) {
        add(kind, head, head + 1, pos, more, behind, finish);
      }
    }
  };

  int asked = 0;
  for (int run = first_run; run < runs; ++run) {
    if (LaneOf(part, run, layer, head_begin) == Lane::kInPlace) ++asked;
  }
  const bool whole = asked > 0 && asked == runs - first_run;
  if (asked > 0) {
    AskStore(part, layer, head_begin, head_end);
    kernels::MergeItem merge;
    merge.row_begin = part.row_begin;
    merge.row_count = static_cast<int32_t>(part.what->num_tokens());
    merge.kv_head_begin = head_begin;
    merge.kv_head_end = head_end;
    merge.reset = whole ? 1 : 0;
    merge.finish = whole ? 0 : 1;
    merge_scratch_.push_back(merge);
  }
  if (whole) {
    std::fill(progress_.begin(), progress_.end(), sealed);
    add(kAfter, head_begin, head_end, sealed, own, own.first_pos + own.count, /*finish=*/true);
    return;
  }

  tile_scratch_.clear();
  for (int run = first_run; run < runs; ++run) {
    if (LaneOf(part, run, layer, head_begin) != Lane::kFetched) continue;
    const int64_t begin = std::max(part.kv->runs[run].first_pos, first_key);
    while (run + 1 < runs && LaneOf(part, run + 1, layer, head_begin) == Lane::kFetched) ++run;
    const Run& last = part.kv->runs[run];
    CutIntoTiles(tiling_, kernels::WideHeadsAtOnce(wide_, rows_, config_.window(layer)), geometry_,
                 {head_begin, head_end, begin,
                  std::min(last.first_pos + last.capacity_tokens, sealed)},
                 pipeline_->max_tile_bytes(), tile_scratch_);
  }
  for (const Rectangle& rectangle : tile_scratch_) {
    item_scratch_[kTile].clear();
    span_scratch_[kTile].clear();
    const int tile = pipeline_->AddTile(*part.kv, layer, rectangle);
    // A chunk's attention cuts keys where launches end, and rounds what it has of each piece: a launch that would
    // end inside one takes the keys up to its end that are resident, as it would if all were.
    const int64_t behind = ResidentTo(part, layer, head_begin, rectangle.end_pos,
                                      std::min(sealed, PieceEnd(rectangle.end_pos)));
    add_heads(kTile, rectangle.kv_head_begin, rectangle.kv_head_end, rectangle.first_pos,
              pipeline_->SpanOf(tile), behind, /*finish=*/false);
    for (int32_t head = rectangle.kv_head_begin; head < rectangle.kv_head_end; ++head) {
      progress_[head] = behind;
    }
    tile_launches_.push_back({tables.Add(item_scratch_[kTile]), tables.Add(span_scratch_[kTile])});
  }
  add_heads(tile_scratch_.empty() ? kLocal : kLast, head_begin, head_end, sealed, own,
            own.first_pos + own.count, /*finish=*/asked == 0);
}

}  // namespace headroom
