#include "services/worker/step_context.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "kernels/cpu/tile_attention.h"
#include "services/worker/draw_state.h"

namespace headroom {
namespace {

using kernels::AttendItem;
using kernels::CopyKvItem;
using kernels::KvSpan;

enum MoveKind { kPrelude, kSeal, kMirror, kKeep };
enum LaunchKind { kLocal, kTile, kLast, kAfter };

// Of the staging memory, for one flight's await_result.
constexpr int64_t kAwaitResultBytes = 64;

// The span with only positions [begin, end).
KvSpan Clip(KvSpan span, int64_t begin, int64_t end) {
  const int64_t last = std::min(span.first_pos + span.count, end);
  span.first_pos = std::max(span.first_pos, begin);
  span.count = static_cast<int32_t>(std::max<int64_t>(0, last - span.first_pos));
  return span;
}

}  // namespace

StepContext::StepContext(const ModelConfig& config, int64_t fast_queries,
                         const kernels::WideShape& wide, int64_t max_rows, GpuKv& kv,
                         InPlaceLane& in_place, uint32_t slot,
                         std::unique_ptr<FetchPipeline> pipeline)
    : config_(config),
      geometry_(config.kv_geometry()),
      group_(config.num_q_heads / config.num_kv_heads),
      fast_queries_(fast_queries),
      wide_(wide),
      max_rows_(max_rows),
      kv_(kv),
      in_place_(in_place),
      slot_(slot),
      pipeline_(std::move(pipeline)),
      layers_(config.num_layers),
      progress_(config.num_kv_heads) {
  parts_.reserve(kMaxDecodeRows);
  runs_in_place_.reserve(kMaxDecodeRows * config.num_kv_heads);
  tile_launches_.reserve(4096);
  embed_scratch_.reserve(max_rows);
  position_scratch_.reserve(max_rows);
  row_scratch_.reserve(kMaxResults);
  sample_scratch_.reserve(kMaxResults);
  append_scratch_.reserve(kMaxDecodeRows);
  for (auto& scratch : copy_scratch_) scratch.reserve(4096);
  for (auto& scratch : item_scratch_) scratch.reserve(4096);
  for (auto& scratch : span_scratch_) scratch.reserve(16384);
  tile_scratch_.reserve(4096);
  merge_scratch_.reserve(4096);
  mailbox_scratch_.reserve(4096);
}

int64_t StepContext::StagingBytes(const DeviceBudget& budget) {
  return kStepsInFlight *
         (budget.table_bytes + kMaxResults * static_cast<int64_t>(sizeof(kernels::SampleResult)) +
          kAwaitResultBytes + budget.draw_state_bytes);
}

absl::StatusOr<std::unique_ptr<StepContext>> StepContext::Create(
    Device& device, const ModelConfig& config, const DeviceBudget& budget, int64_t max_rows,
    bool has_chunks, GpuKv& kv, InPlaceLane& in_place, uint32_t slot,
    std::unique_ptr<FetchPipeline> pipeline, uint8_t* staging) {
  // Of the store's pool, which runs on the same processors, and multiplies in tiles for GPUs alone.
  const bool tiles = device.product_type() == kernels::ElementType::kBFloat16 &&
                     kernels::cpu::BestTileAttention() != nullptr;
  const bool wide = has_chunks && device.product_type() == kernels::ElementType::kBFloat16;
  auto context = std::unique_ptr<StepContext>(
      new StepContext(config, tiles ? kFastQueriesInTiles : kFastQueries,
                      wide ? WideShapeOf(config, max_rows) : kernels::WideShape(), max_rows, kv,
                      in_place, slot, std::move(pipeline)));
  constexpr int64_t kFloat = sizeof(float);
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const x,
                            device.Allocate(max_rows * config.hidden * kFloat, "activations"));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const cos_sin,
                            device.Allocate(max_rows * config.head_dim * kFloat, "activations"));
  context->x_ = reinterpret_cast<float*>(x);
  context->cos_sin_ = reinterpret_cast<float*>(cos_sin);
  if (has_chunks) {
    context->chunk_buffer_bytes_ = ChunkBufferBytes(config, max_rows) / 2;
    for (uint8_t*& buffer : context->chunk_buffers_) {
      HEADROOM_ASSIGN_OR_RETURN(buffer,
                                device.Allocate(context->chunk_buffer_bytes_, "activations"));
    }
  }
  constexpr int64_t kResultBytes = kMaxResults * static_cast<int64_t>(sizeof(kernels::SampleResult));
  for (Flight& flight : context->flights_) {
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const tables,
                              device.Allocate(budget.table_bytes, "activations"));
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const results, device.Allocate(kResultBytes, "activations"));
    flight.tables = StepTables(staging, tables, budget.table_bytes);
    staging += budget.table_bytes;
    flight.results = reinterpret_cast<kernels::SampleResult*>(results);
    flight.host_results = reinterpret_cast<kernels::SampleResult*>(staging);
    staging += kResultBytes;
    flight.await_result = new (staging) std::atomic<uint32_t>(kernels::kAwaitOk);
    staging += kAwaitResultBytes;
    flight.draw_state = reinterpret_cast<kernels::DrawState*>(staging);
    staging += budget.draw_state_bytes;
    HEADROOM_ASSIGN_OR_RETURN(flight.done, device.CreateEvent());
    HEADROOM_ASSIGN_OR_RETURN(flight.sealed_done, device.CreateEvent());
  }
  for (int parity = 0; parity < 2; ++parity) {
    HEADROOM_ASSIGN_OR_RETURN(context->appended[parity], device.CreateEvent());
    HEADROOM_ASSIGN_OR_RETURN(context->sealed[parity], device.CreateEvent());
  }
  HEADROOM_ASSIGN_OR_RETURN(context->all_sealed, device.CreateEvent());
  return context;
}

namespace {

absl::Status Wrong(const StepSequence& sequence, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("sequence ", sequence.sequence_id, ": ", what));
}

}  // namespace

// What holds whatever else is in the step.
absl::Status StepContext::CheckPart(const StepSequence& sequence,
                                    const GpuKv::Sequence& kv) const {
  const int64_t first = sequence.first_pos;
  const int64_t sealed = sequence.sealed_tokens;
  if (first < 0 || first > kv.known_end) {
    return Wrong(sequence, absl::StrCat("first_pos ", first, ", keys are known up to position ",
                                        kv.known_end));
  }
  const int64_t most_sealed = std::min(kv.sealed_tokens, first);
  if (sealed < 0 || sealed % kBlockTokens != 0 || sealed > most_sealed) {
    return Wrong(sequence, absl::StrCat("sealed_tokens ", sealed,
                                        ", expected a multiple of 64 up to ", most_sealed));
  }
  if (FloorToBlock(sequence.end_pos()) > kv.capacity_tokens()) {
    return Wrong(sequence, absl::StrCat("positions to ", sequence.end_pos(), " and extents for ",
                                        kv.capacity_tokens()));
  }
  for (const auto* ids : {&sequence.token_ids, &sequence.score_token_ids}) {
    for (const int32_t id : *ids) {
      if (id < 0 || id >= config_.vocab) {
        return Wrong(sequence,
                     absl::StrCat("token id ", id, " of a vocabulary of ", config_.vocab));
      }
    }
  }
  if (sequence.token_ids.empty() && !kv.has_drawn) {
    return Wrong(sequence, "no token ids, and no token was drawn yet");
  }
  if (sequence.score_token_ids.size() > static_cast<size_t>(sequence.num_tokens())) {
    return Wrong(sequence, "more tokens to score than new tokens");
  }
  return sequence.draw ? CheckDraw(sequence, kv) : absl::OkStatus();
}

absl::Status StepContext::CheckDraw(const StepSequence& sequence,
                                    const GpuKv::Sequence& kv) const {
  if (kv.draw_state == nullptr) {
    if (!Penalises(sequence.sampling)) return absl::OkStatus();
    return Wrong(sequence, "penalties, but it was opened without a history");
  }
  if (!kv.draw_state_filled) return Wrong(sequence, "its history was never filled");
  const int64_t drawn_pos = sequence.end_pos();
  if (sequence.known_tokens < 0 || sequence.known_tokens > drawn_pos ||
      drawn_pos < kv.counted_tokens || drawn_pos - kv.counted_tokens > kernels::kRecentTokens) {
    return Wrong(sequence, absl::StrCat("a draw at position ", drawn_pos, " with known_tokens ",
                                        sequence.known_tokens, ", of which ", kv.counted_tokens,
                                        " are counted"));
  }
  return absl::OkStatus();
}

absl::Status StepContext::AddPart(const StepSequence& sequence) {
  Part part;
  part.what = &sequence;
  part.kv = kv_.Find(sequence.sequence_id);
  if (part.kv == nullptr) {
    return absl::NotFoundError(absl::StrCat("sequence ", sequence.sequence_id, " is not open"));
  }
  for (const Part& other : parts_) {
    if (other.kv == part.kv) return Wrong(sequence, "twice in one step");
  }
  HEADROOM_RETURN_IF_ERROR(CheckPart(sequence, *part.kv));
  if (rows_ + sequence.num_tokens() > max_rows_) {
    return Wrong(sequence, absl::StrCat("more than ", max_rows_, " new tokens in one step"));
  }
  const int64_t first = sequence.first_pos;
  const int64_t end = sequence.end_pos();
  const int64_t sealed = sequence.sealed_tokens;
  part.first_own_pos = sealed;
  part.in_tail = end - sealed <= kTailTokens;
  // Unsealed keys in front of the new ones lie in the tail. A chunk that is repeated has already
  // replaced them there by what it left; but then it has sealed them too.
  if (first > sealed && sealed < part.kv->tail_begin) {
    part.prelude_sealed = !part.in_tail && CeilToBlock(first) <= part.kv->sealed_tokens;
    if (!part.prelude_sealed) {
      return Wrong(sequence, absl::StrCat("sealed_tokens ", sealed,
                                          ", the tail holds keys from position ",
                                          part.kv->tail_begin, " on"));
    }
  }
  if (!part.in_tail) {
    if (first - sealed >= kTailTokens) {
      return Wrong(sequence, absl::StrCat(first - sealed, " unsealed tokens, the tail holds ",
                                          kTailTokens));
    }
    part.chunk_offset_bytes = chunk_bytes_;
    chunk_bytes_ += CeilToBlock(end - sealed) * geometry_.BytesPerTokenPerLayer();
    if (chunk_bytes_ > chunk_buffer_bytes_) {
      return Wrong(sequence, "the unsealed and new tokens of the step are too many together");
    }
  }
  HEADROOM_RETURN_IF_ERROR(CheckExtents(part));
  part.row_begin = static_cast<int32_t>(rows_);
  rows_ += sequence.num_tokens();
  parts_.push_back(part);
  return absl::OkStatus();
}

absl::Status StepContext::CheckExtents(const Part& part) const {
  if (!part.kv->has_vacated) return absl::OkStatus();
  for (const Run& run : part.kv->runs) {
    const int64_t end = run.first_pos + run.capacity_tokens;
    for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
      if (run.data_offsets[layer] != Run::kVacated) continue;
      // A prelude is read from its first key on, whether it is seen or not.
      const int64_t from =
          part.prelude_sealed ? std::min(part.first_own_pos, FirstKey(part, layer))
                              : FirstKey(part, layer);
      if (end <= from) continue;
      return Wrong(*part.what, absl::StrCat("first_pos ", part.what->first_pos,
                                            " needs keys from position ", from, " on in layer ",
                                            layer, ", whose extent at position ", run.first_pos,
                                            " is vacated"));
    }
  }
  return absl::OkStatus();
}

absl::Status StepContext::BeginStep(std::unique_ptr<Step> step, const Plan& plan, int index) {
  Flight& flight = flights_[index];
  flight.tables.Clear();
  for (OpAccount& account : flight.accounts) account.Clear();
  for (OpAccount* const account :
       {&flight.tile_reads, &flight.sealed, &flight.fetch_wait, &flight.in_place_wait}) {
    account->Clear();
  }
  flight.await_result->store(kernels::kAwaitOk);
  flight.in_place_totals = nullptr;
  std::fill(std::begin(flight.kv_heads), std::end(flight.kv_heads), 0.0);
  parts_.clear();
  tile_launches_.clear();
  rows_ = chunk_bytes_ = 0;
  seals_ = false;
  flight.step = std::move(step);
  const Step& s = *flight.step;
  tiling_ = s.has_chunk() ? Tiling::kPrefill : Tiling::kDecode;
  for (const StepSequence& sequence : s.sequences) HEADROOM_RETURN_IF_ERROR(AddPart(sequence));
  BuildRows(flight.tables);
  HEADROOM_RETURN_IF_ERROR(BuildResults(s, flight.tables));
  flight.num_results = sample_rows_.count;
  heads_at_once_ = kernels::WideHeadsAtOnce(wide_, rows_);
  pipeline_->BeginStep(&flight.accounts[static_cast<int>(Lane::kFetched)], &flight.fetch_wait);
  plan_ = &plan;
  may_ask_store_ = rows_ <= kMaxInPlaceRows && in_place_.ready();
  if (may_ask_store_) in_place_.BeginTable(slot_, static_cast<uint32_t>(index));
  bool asks_store = false;
  for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
    BuildLayer(layer, flight.tables, flight);
    asks_store = asks_store || layers_[layer].in_place();
  }
  HEADROOM_RETURN_IF_ERROR(flight.tables.Check());
  if (asks_store) {
    HEADROOM_RETURN_IF_ERROR(in_place_.EndTable());
    flight.in_place_totals = in_place_.totals(slot_, static_cast<uint32_t>(index));
  }
  flight.seals = seals_;
  // From here on the step may overwrite what the tail held, even if it fails half-way.
  for (const Part& part : parts_) {
    const int64_t end = part.what->end_pos();
    part.kv->tail_begin =
        std::max(part.kv->tail_begin, part.in_tail ? end - kTailTokens : FloorToBlock(end));
  }
  return absl::OkStatus();
}

void StepContext::Commit() {
  for (const Part& part : parts_) {
    const int64_t end = part.what->end_pos();
    part.kv->known_end = std::max(part.kv->known_end, end);
    part.kv->sealed_tokens = std::max(part.kv->sealed_tokens, FloorToBlock(end));
    part.kv->has_drawn = part.kv->has_drawn || part.what->draw;
    if (part.what->draw && part.kv->draw_state != nullptr) {
      part.kv->counted_tokens = std::max(part.kv->counted_tokens, part.what->known_tokens);
    }
  }
}

void StepContext::BuildRows(StepTables& tables) {
  embed_scratch_.clear();
  position_scratch_.clear();
  for (const Part& part : parts_) {
    for (int64_t i = 0; i < part.what->num_tokens(); ++i) {
      const int32_t id = part.what->token_ids.empty() ? -1 : part.what->token_ids[i];
      embed_scratch_.push_back({id, part.kv->slot});
      position_scratch_.push_back(part.what->first_pos + i);
    }
  }
  tokens_ = tables.Add(embed_scratch_);
  positions_ = tables.Add(position_scratch_);
}

absl::Status StepContext::BuildResults(const Step& step, StepTables& tables) {
  row_scratch_.clear();
  sample_scratch_.clear();
  for (const Part& part : parts_) {
    const StepSequence& s = *part.what;
    for (size_t i = 0; i < s.score_token_ids.size(); ++i) {
      kernels::SampleRow row;
      row.forced_token = s.score_token_ids[i];
      row.num_top_logprobs = s.num_top_logprobs;
      row.result_index = static_cast<int32_t>(sample_scratch_.size());
      row_scratch_.push_back(part.row_begin + static_cast<int32_t>(i));
      sample_scratch_.push_back(row);
    }
    if (!s.draw) continue;
    kernels::SampleRow row = s.sampling;
    row.counter = static_cast<uint64_t>(s.end_pos());
    row.forced_token = -1;
    row.num_top_logprobs = s.num_top_logprobs;
    row.slot = part.kv->slot;
    row.state = part.kv->draw_state;
    if (row.state != nullptr) {
      const int64_t settled = std::max(part.kv->counted_tokens, s.known_tokens);
      row.num_settled = static_cast<int32_t>(settled - part.kv->counted_tokens);
      row.num_recent = static_cast<int32_t>(s.end_pos() - settled);
    }
    row.result_index = static_cast<int32_t>(sample_scratch_.size());
    row_scratch_.push_back(part.row_begin + static_cast<int32_t>(s.num_tokens()) - 1);
    sample_scratch_.push_back(row);
  }
  if (static_cast<int64_t>(sample_scratch_.size()) > kMaxResults) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.number, " asks for ",
                                                   sample_scratch_.size(), " results, at most ",
                                                   kMaxResults));
  }
  result_rows_ = tables.Add(row_scratch_);
  sample_rows_ = tables.Add(sample_scratch_);
  return absl::OkStatus();
}

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

int StepContext::FirstRun(const Part& part, int32_t layer) const {
  const int64_t first_key = FirstKey(part, layer);
  int run = 0;
  while (run < SealedRuns(part) && SealedTokens(part, run, first_key) == 0) ++run;
  return run;
}

int StepContext::SealedRuns(const Part& part) const {
  int runs = 0;
  while (runs < static_cast<int>(part.kv->runs.size()) &&
         part.kv->runs[runs].first_pos < part.what->sealed_tokens) {
    ++runs;
  }
  return runs;
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
  // Adds an item of `kind` with the local keys of [progress of the head, pos) and then `more`.
  const auto add = [&](LaunchKind kind, int32_t begin, int32_t end, int64_t pos,
                       const KvSpan& more, bool finish) {
    AttendItem item;
    item.row_begin = part.row_begin;
    item.row_count = static_cast<int32_t>(part.what->num_tokens());
    item.first_pos = part.what->first_pos;
    item.kv_head_begin = begin;
    item.kv_head_end = end;
    item.span_begin = static_cast<int32_t>(span_scratch_[kind].size());
    item.reset = progress_[begin] == first_key ? 1 : 0;
    item.finish = finish ? 1 : 0;
    for (int run = first_run; run < runs && progress_[begin] < pos; ++run) {
      const KvSpan span =
          Clip(kv_.Resident(*part.kv, run, layer, begin), progress_[begin], pos);
      if (span.base != nullptr && span.count > 0) span_scratch_[kind].push_back(span);
    }
    span_scratch_[kind].push_back(more);
    item.span_count = static_cast<int32_t>(span_scratch_[kind].size()) - item.span_begin;
    item_scratch_[kind].push_back(item);
  };
  // Resident copies lie apart, head by head; without any, all heads are one item.
  const auto add_heads = [&](LaunchKind kind, int32_t begin, int32_t end, int64_t pos,
                             const KvSpan& more, bool finish) {
    if (progress_[begin] >= pos) {
      add(kind, begin, end, pos, more, finish);
    } else {
      for (int32_t head = begin; head < end; ++head) add(kind, head, head + 1, pos, more, finish);
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
    add(kAfter, head_begin, head_end, sealed, own, /*finish=*/true);
    return;
  }

  tile_scratch_.clear();
  for (int run = first_run; run < runs; ++run) {
    if (LaneOf(part, run, layer, head_begin) != Lane::kFetched) continue;
    const int64_t begin = std::max(part.kv->runs[run].first_pos, first_key);
    while (run + 1 < runs && LaneOf(part, run + 1, layer, head_begin) == Lane::kFetched) ++run;
    const Run& last = part.kv->runs[run];
    CutIntoTiles(tiling_, heads_at_once_, geometry_,
                 {head_begin, head_end, begin,
                  std::min(last.first_pos + last.capacity_tokens, sealed)},
                 pipeline_->max_tile_bytes(), tile_scratch_);
  }
  for (const Rectangle& rectangle : tile_scratch_) {
    item_scratch_[kTile].clear();
    span_scratch_[kTile].clear();
    const int tile = pipeline_->AddTile(*part.kv, layer, rectangle);
    add_heads(kTile, rectangle.kv_head_begin, rectangle.kv_head_end, rectangle.first_pos,
              pipeline_->SpanOf(tile), /*finish=*/false);
    for (int32_t head = rectangle.kv_head_begin; head < rectangle.kv_head_end; ++head) {
      progress_[head] = rectangle.end_pos;
    }
    tile_launches_.push_back({tables.Add(item_scratch_[kTile]), tables.Add(span_scratch_[kTile])});
  }
  add_heads(tile_scratch_.empty() ? kLocal : kLast, head_begin, head_end, sealed, own,
            /*finish=*/asked == 0);
}

}  // namespace headroom
