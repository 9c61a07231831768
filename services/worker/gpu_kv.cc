#include "services/worker/gpu_kv.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "common/checked_math.h"
#include "common/status.h"
#include "kernels/attention.h"

namespace headroom {
namespace {

// Runs that a sequence may have without reallocating its tables: doubling from 64 tokens, then
// full-size extents of some thousand tokens.
constexpr int kReservedRuns = 64;

bool SameRun(const Run& a, const Run& b) {
  return a.first_pos == b.first_pos && a.capacity_tokens == b.capacity_tokens &&
         a.data_offsets == b.data_offsets;
}

int64_t GranuleBytes(const KvGeometry& geometry) {
  return kBlockTokens * geometry.BytesPerTokenPerHead();
}

}  // namespace

GpuKv::GpuKv(const KvGeometry& geometry, uint8_t* pool, int64_t pool_bytes, int32_t max_sequences,
             int64_t draw_state_bytes, std::vector<int64_t> windows)
    : geometry_(geometry),
      tail_layer_bytes_(kTailTokens * geometry.BytesPerTokenPerLayer()),
      draw_state_bytes_(draw_state_bytes),
      windows_(std::move(windows)),
      pool_(pool, pool_bytes, GranuleBytes(geometry)) {
  sequences_.reserve(max_sequences);
  for (int32_t slot = max_sequences - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

absl::Status GpuKv::CheckRun(const Sequence& sequence, const Run& run) const {
  const auto wrong = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", sequence.id, ", run at position ",
                                                   run.first_pos, ": ", what));
  };
  if (run.first_pos != sequence.capacity_tokens()) {
    return wrong(absl::StrCat("expected at position ", sequence.capacity_tokens()));
  }
  if (run.capacity_tokens < kBlockTokens || run.capacity_tokens > geometry_.MaxExtentTokens() ||
      !std::has_single_bit(static_cast<uint64_t>(run.capacity_tokens))) {
    return wrong(absl::StrCat("capacity ", run.capacity_tokens, ", expected a power of two from ",
                              kBlockTokens, " to ", geometry_.MaxExtentTokens()));
  }
  if (!CheckedAdd(run.first_pos, run.capacity_tokens).has_value()) return wrong("too far");
  if (static_cast<int32_t>(run.data_offsets.size()) != geometry_.num_layers) {
    return wrong(absl::StrCat(run.data_offsets.size(), " extents, expected one for each of ",
                              geometry_.num_layers, " layers"));
  }
  const int64_t bytes = run.capacity_tokens * geometry_.BytesPerTokenPerLayer();
  for (const int64_t offset : run.data_offsets) {
    if (offset == Run::kVacated) continue;
    if (!RangeFits(offset, bytes, segment_.bytes) || offset % 64 != 0) {
      return wrong(absl::StrCat("extent at byte ", offset, " of ", bytes,
                                " bytes leaves the segment of ", segment_.bytes));
    }
  }
  return absl::OkStatus();
}

void GpuKv::AddRun(Sequence& sequence, const Run& run) {
  sequence.runs.push_back(run);
  sequence.has_vacated = sequence.has_vacated ||
                         std::find(run.data_offsets.begin(), run.data_offsets.end(),
                                   Run::kVacated) != run.data_offsets.end();
  sequence.residents.resize(
      sequence.runs.size() * geometry_.num_layers * geometry_.num_kv_heads, nullptr);
}

absl::Status GpuKv::Open(const OpenSequence& open) {
  if (Find(open.sequence_id) != nullptr) {
    return absl::AlreadyExistsError(absl::StrCat("sequence ", open.sequence_id, " is open"));
  }
  if (free_slots_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", sequences_.size(), " sequence slots are in use"));
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->id = open.sequence_id;
  sequence->runs.reserve(kReservedRuns);
  sequence->residents.reserve(size_t{kReservedRuns} * geometry_.num_layers *
                              geometry_.num_kv_heads);
  for (const Run& run : open.runs) {
    HEADROOM_RETURN_IF_ERROR(CheckRun(*sequence, run));
    AddRun(*sequence, run);
  }
  if (open.sealed_tokens < 0 || open.sealed_tokens % kBlockTokens != 0 ||
      open.sealed_tokens > sequence->capacity_tokens()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", open.sequence_id, ": sealed_tokens ", open.sealed_tokens,
                     ", expected a multiple of 64 up to ", sequence->capacity_tokens()));
  }
  sequence->sealed_tokens = sequence->known_end = sequence->tail_begin = open.sealed_tokens;
  const auto no_room = [&](absl::string_view what, int64_t bytes) {
    for (uint8_t* const taken : sequence->tails) pool_.Free(taken, tail_layer_bytes_);
    return absl::ResourceExhaustedError(absl::StrCat(
        "no device memory for ", what, ": it takes ", bytes, " bytes, the pool of ",
        pool_.capacity_bytes(), " has ", pool_.free_bytes(), " left"));
  };
  while (static_cast<int32_t>(sequence->tails.size()) < geometry_.num_layers) {
    uint8_t* const tail = Take(tail_layer_bytes_);
    if (tail == nullptr) {
      return no_room("the tail of another sequence", tail_layer_bytes_ * geometry_.num_layers);
    }
    sequence->tails.push_back(tail);
  }
  if (open.history.has_value()) {
    uint8_t* const state = Take(draw_state_bytes_);
    if (state == nullptr) return no_room("the history of a sequence's draws", draw_state_bytes_);
    sequence->draw_state = reinterpret_cast<kernels::DrawState*>(state);
  }
  sequence->slot = free_slots_.back();
  free_slots_.pop_back();
  sequences_.push_back(std::move(sequence));
  return absl::OkStatus();
}

absl::Status GpuKv::Grant(const RunGrant& grant) {
  Sequence* const sequence = Find(grant.sequence_id);
  if (sequence == nullptr) {
    return absl::NotFoundError(absl::StrCat("sequence ", grant.sequence_id, " is not open"));
  }
  HEADROOM_RETURN_IF_ERROR(CheckRun(*sequence, grant.run));
  AddRun(*sequence, grant.run);
  return absl::OkStatus();
}

void GpuKv::Close(uint64_t sequence_id) {
  const auto at =
      std::find_if(sequences_.begin(), sequences_.end(),
                   [&](const auto& sequence) { return sequence->id == sequence_id; });
  if (at == sequences_.end()) return;
  Sequence& sequence = **at;
  for (int run = 0; run < static_cast<int>(sequence.runs.size()); ++run) {
    for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
      for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
        DropResident(sequence, run, layer, head);
      }
    }
  }
  if (sequence.draw_state != nullptr) {
    pool_.Free(reinterpret_cast<uint8_t*>(sequence.draw_state), draw_state_bytes_);
  }
  for (uint8_t* const tail : sequence.tails) pool_.Free(tail, tail_layer_bytes_);
  freed_ = true;
  free_slots_.push_back(sequence.slot);
  sequences_.erase(at);
}

void GpuKv::CloseAll() {
  while (!sequences_.empty()) Close(sequences_.back()->id);
}

GpuKv::Sequence* GpuKv::Find(uint64_t sequence_id) {
  for (const auto& sequence : sequences_) {
    if (sequence->id == sequence_id) return sequence.get();
  }
  return nullptr;
}

bool GpuKv::Holds(const OpenSequence& open) {
  const Sequence* const sequence = Find(open.sequence_id);
  return sequence != nullptr && sequence->runs.size() >= open.runs.size() &&
         std::equal(open.runs.begin(), open.runs.end(), sequence->runs.begin(), SameRun);
}

bool GpuKv::Holds(const RunGrant& grant) {
  const Sequence* const sequence = Find(grant.sequence_id);
  return sequence != nullptr &&
         std::any_of(sequence->runs.begin(), sequence->runs.end(),
                     [&](const Run& run) { return SameRun(run, grant.run); });
}

// No query from the next position on sees the run. (A step that is repeated from an earlier one finds the
// keys in the extent.)
bool GpuKv::BehindWindow(const Sequence& sequence, int run, int32_t layer) const {
  const int64_t window = layer < static_cast<int32_t>(windows_.size()) ? windows_[layer] : 0;
  const Run& where = sequence.runs[run];
  return where.data_offsets[layer] == Run::kVacated ||
         where.first_pos + where.capacity_tokens <=
             FloorToBlock(kernels::FirstSeen(window, sequence.known_end));
}

uint8_t*& GpuKv::ResidentSlot(Sequence& sequence, int run, int32_t layer, int32_t kv_head) const {
  return sequence.residents[(size_t{static_cast<size_t>(run)} * geometry_.num_layers + layer) *
                                geometry_.num_kv_heads +
                            kv_head];
}

void GpuKv::DropResident(Sequence& sequence, int run, int32_t layer, int32_t kv_head) {
  uint8_t*& copy = ResidentSlot(sequence, run, layer, kv_head);
  if (copy == nullptr) return;
  pool_.Free(copy, sequence.runs[run].capacity_tokens * geometry_.BytesPerTokenPerHead());
  copy = nullptr;
  freed_ = true;
}

uint8_t* GpuKv::Take(int64_t bytes) {
  for (;;) {
    uint8_t* const taken = pool_.Allocate(bytes);
    if (taken != nullptr || !EvictOne()) return taken;
  }
}

bool GpuKv::EvictOne() {
  for (int run = 0;; ++run) {
    bool any_run = false;
    for (const auto& sequence : sequences_) {
      if (run >= static_cast<int>(sequence->runs.size())) continue;
      any_run = true;
      for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
        for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
          if (ResidentSlot(*sequence, run, layer, head) == nullptr) continue;
          DropResident(*sequence, run, layer, head);
          return true;
        }
      }
    }
    if (!any_run) return false;
  }
}

void GpuKv::ApplyPlan(
    const Plan& plan,
    const std::function<void(const Sequence&, int, int32_t, int32_t)>& promote, bool drop_behind) {
  // First drop, then take: what one copy gives up another may use.
  for (const bool drop : {true, false}) {
    for (const auto& sequence : sequences_) {
      for (int run = 0; run < static_cast<int>(sequence->runs.size()); ++run) {
        for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
          for (int32_t head = 0; head < geometry_.num_kv_heads; ++head) {
            const Run& where = sequence->runs[run];
            uint8_t*& copy = ResidentSlot(*sequence, run, layer, head);
            const bool planned = plan.LaneOf(layer, head, where.first_pos) == Lane::kResident;
            const bool behind = BehindWindow(*sequence, run, layer);
            if (drop && (!planned || (behind && drop_behind))) {
              DropResident(*sequence, run, layer, head);
            }
            if (drop || !planned || behind || copy != nullptr) continue;
            copy = pool_.Allocate(where.capacity_tokens * geometry_.BytesPerTokenPerHead());
            if (copy != nullptr) promote(*sequence, run, layer, head);
          }
        }
      }
    }
  }
  for (const auto& sequence : sequences_) {
    const int64_t next = NextDropPos(*sequence);
    sequence->next_drop_pos = drop_behind ? next : std::min(sequence->next_drop_pos, next);
  }
}

bool GpuKv::WindowsMoved() const {
  return std::any_of(sequences_.begin(), sequences_.end(), [](const auto& sequence) {
    return sequence->known_end >= sequence->next_drop_pos;
  });
}

int64_t GpuKv::NextDropPos(const Sequence& sequence) const {
  int64_t next = std::numeric_limits<int64_t>::max();
  for (const int64_t window : windows_) {
    for (const Run& run : sequence.runs) {
      const int64_t pos = run.first_pos + run.capacity_tokens + window - 1;
      if (window != 0 && pos > sequence.known_end) next = std::min(next, pos);
    }
  }
  return next;
}

kernels::KvSpan GpuKv::Tail(const Sequence& sequence, int32_t layer) const {
  kernels::KvSpan span;
  span.base = sequence.tails[layer];
  span.capacity = kTailTokens;
  span.kv_head_end = geometry_.num_kv_heads;
  return span;
}

kernels::KvSpan GpuKv::Extent(const Sequence& sequence, int run, int32_t layer) const {
  const Run& where = sequence.runs[run];
  kernels::KvSpan span;
  if (where.data_offsets[layer] != Run::kVacated) {
    span.base = segment_.data + where.data_offsets[layer];
  }
  span.origin_pos = span.first_pos = where.first_pos;
  span.capacity = span.count = static_cast<int32_t>(where.capacity_tokens);
  span.kv_head_end = geometry_.num_kv_heads;
  return span;
}

kernels::KvSpan GpuKv::Resident(const Sequence& sequence, int run, int32_t layer,
                                int32_t kv_head) const {
  const Run& where = sequence.runs[run];
  kernels::KvSpan span;
  span.base = ResidentSlot(const_cast<Sequence&>(sequence), run, layer, kv_head);
  span.origin_pos = span.first_pos = where.first_pos;
  span.capacity = span.count = static_cast<int32_t>(where.capacity_tokens);
  span.kv_head_begin = kv_head;
  span.kv_head_end = kv_head + 1;
  return span;
}

}  // namespace headroom
