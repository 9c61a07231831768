#include "services/worker/step_context.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "kernels/cpu/tile_attention.h"
#include "services/worker/draw_state.h"

namespace headroom {
namespace {

// Of the staging memory, for one flight's await_result.
constexpr int64_t kAwaitResultBytes = 64;

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

}  // namespace headroom
