#include "services/kvstore/extent_index.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/status.h"

namespace headroom::kvstore {
namespace {

absl::Status UnknownSequenceError(uint64_t sequence_id) {
  return WithReason(absl::NotFoundError(absl::StrCat("there is no sequence ", sequence_id)),
                    "SEQUENCE_UNKNOWN");
}

int MaxOrder(const KvGeometry& geometry) {
  return std::countr_zero(static_cast<uint64_t>(geometry.MaxExtentTokens() / kBlockTokens));
}

}  // namespace

ExtentIndex::ExtentIndex(std::span<ExtentDescriptor> descriptors, const KvGeometry& geometry)
    : descriptors_(descriptors),
      geometry_(geometry),
      allocator_(kBlockTokens * geometry.BytesPerTokenPerLayer(), MaxOrder(geometry)) {
  free_ids_.resize(descriptors.size());
  for (size_t i = 0; i < free_ids_.size(); ++i) {
    free_ids_[i] = static_cast<uint32_t>(free_ids_.size() - 1 - i);
  }
}

// ---------------------------------------------------------------- runs

bool ExtentIndex::IsCapacity(int64_t tokens) const {
  return tokens >= kBlockTokens && tokens <= geometry_.MaxExtentTokens() &&
         std::has_single_bit(static_cast<uint64_t>(tokens));
}

absl::Status ExtentIndex::CheckNewRun(const StoredSequence* sequence, int64_t first_pos,
                                      int64_t capacity_tokens) const {
  if (!IsCapacity(capacity_tokens)) {
    return BadRequestError({{"capacity_tokens",
                             absl::StrCat("is ", capacity_tokens, ", expected a power of two from ",
                                          kBlockTokens, " to ", geometry_.MaxExtentTokens())}});
  }
  if (first_pos < 0 || first_pos % kBlockTokens != 0 || first_pos > kMaxPositions) {
    return BadRequestError({{"first_pos", absl::StrCat("is ", first_pos, ", expected a multiple of ",
                                                       kBlockTokens, " up to ", kMaxPositions)}});
  }
  const int64_t end = sequence == nullptr ? 0 : sequence->capacity_tokens();
  if (first_pos != end) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat("the run begins at position ", first_pos,
                                                   ", the sequence's last one ends at ", end)),
        "RUN_DOES_NOT_FOLLOW");
  }
  return absl::OkStatus();
}

absl::Status ExtentIndex::FullError(int64_t capacity_tokens) const {
  return WithReason(
      absl::ResourceExhaustedError(absl::StrCat(
          "no room for ", geometry_.num_layers, " extents of ", ExtentBytes(capacity_tokens),
          " bytes: ", allocator_.used_bytes(), " of ", allocator_.capacity_bytes(),
          " bytes and ", used_extents(), " of ", descriptors_.size(), " extents are in use")),
      "SEGMENT_FULL");
}

absl::StatusOr<const StoredRun*> ExtentIndex::AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                                          int64_t capacity_tokens) {
  if (sequence_id == 0) return BadRequestError({{"sequence_id", "is 0"}});
  const auto at = sequences_.find(sequence_id);
  if (at != sequences_.end()) {
    for (const StoredRun& run : at->second.runs) {
      const bool whole = std::none_of(run.extents.begin(), run.extents.end(),
                                      [](const StoredExtent& extent) { return extent.vacated(); });
      if (run.first_pos == first_pos && run.capacity_tokens == capacity_tokens && whole) return &run;
    }
  }
  HEADROOM_RETURN_IF_ERROR(
      CheckNewRun(at == sequences_.end() ? nullptr : &at->second, first_pos, capacity_tokens));
  if (free_ids_.size() < static_cast<size_t>(geometry_.num_layers)) {
    return FullError(capacity_tokens);
  }
  StoredRun run = {first_pos, capacity_tokens, {}};
  const int64_t bytes = ExtentBytes(capacity_tokens);
  for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
    const std::optional<int64_t> offset = allocator_.Allocate(bytes);
    if (!offset.has_value()) {
      for (const StoredExtent& extent : run.extents) allocator_.Free(extent.data_offset, bytes);
      return FullError(capacity_tokens);
    }
    run.extents.push_back({free_ids_[free_ids_.size() - 1 - layer], *offset});
  }
  free_ids_.resize(free_ids_.size() - run.extents.size());
  for (uint32_t layer = 0; layer < run.extents.size(); ++layer) {
    Publish(run.extents[layer].extent_id, sequence_id, run, layer);
  }
  StoredSequence& sequence = sequences_[sequence_id];
  sequence.runs.push_back(std::move(run));
  return &sequence.runs.back();
}

void ExtentIndex::Publish(uint32_t id, uint64_t sequence_id, const StoredRun& run, uint32_t layer) {
  ExtentDescriptor& descriptor = descriptors_[id];
  descriptor.sequence_id = sequence_id;
  descriptor.first_pos = run.first_pos;
  descriptor.data_offset = static_cast<uint64_t>(run.extents[layer].data_offset);
  descriptor.bytes = static_cast<uint64_t>(ExtentBytes(run.capacity_tokens));
  descriptor.capacity_tokens = static_cast<uint32_t>(run.capacity_tokens);
  descriptor.layer = layer;
  StoreRelease(descriptor.vacated, 0);
  StoreRelease(descriptor.sealed, SealedWord(0));
  StoreRelease(descriptor.commit, CommitWordOf(descriptor));
}

void ExtentIndex::FreeLastRun(StoredSequence& sequence) {
  const StoredRun& run = sequence.runs.back();
  for (const StoredExtent& extent : run.extents) {
    Unpublish(extent.extent_id);
    if (!extent.vacated()) {
      allocator_.Free(extent.data_offset, ExtentBytes(run.capacity_tokens));
    }
    free_ids_.push_back(extent.extent_id);
  }
  sequence.runs.pop_back();
}

void ExtentIndex::Vacate(StoredRun& run, const std::vector<int64_t>& kept_from) {
  for (size_t layer = 0; layer < run.extents.size(); ++layer) {
    StoredExtent& extent = run.extents[layer];
    if (extent.vacated() || run.end_pos() > kept_from[layer]) continue;
    // The word first: from then on a store that takes over does not count the bytes as the extent's.
    ExtentDescriptor& descriptor = descriptors_[extent.extent_id];
    StoreRelease(descriptor.vacated, descriptor.commit);
    allocator_.Free(extent.data_offset, ExtentBytes(run.capacity_tokens));
    extent.data_offset = StoredExtent::kVacated;
  }
}

// ---------------------------------------------------------------- what is sealed

void ExtentIndex::WriteSealed(const StoredSequence& sequence, int64_t from, int64_t to) {
  for (auto run = sequence.runs.rbegin(); run != sequence.runs.rend(); ++run) {
    if (run->end_pos() <= from) break;
    if (run->first_pos >= to) continue;
    const uint64_t word = SealedWord(
        std::clamp<int64_t>(sequence.sealed_tokens - run->first_pos, 0, run->capacity_tokens));
    for (const StoredExtent& extent : run->extents) {
      StoreRelease(descriptors_[extent.extent_id].sealed, word);
    }
  }
}

absl::Status ExtentIndex::CheckCount(const SealedCount& count, const StoredSequence& sequence,
                                     const std::string& field) const {
  const auto check = [](const std::string& name, int64_t tokens, int64_t most) {
    if (tokens >= 0 && tokens % kBlockTokens == 0 && tokens <= most) return absl::OkStatus();
    return BadRequestError({{name, absl::StrCat("is ", tokens, ", expected a multiple of ",
                                                kBlockTokens, " up to ", most)}});
  };
  HEADROOM_RETURN_IF_ERROR(
      check(field + ".sealed_tokens", count.sealed_tokens, sequence.capacity_tokens()));
  if (!count.kept_from.empty() &&
      count.kept_from.size() != static_cast<size_t>(geometry_.num_layers)) {
    return BadRequestError({{field + ".kept_from",
                             absl::StrCat("has ", count.kept_from.size(), " elements, expected ",
                                          geometry_.num_layers, " or none")}});
  }
  const int64_t sealed = std::max(count.sealed_tokens, sequence.sealed_tokens);
  for (size_t layer = 0; layer < count.kept_from.size(); ++layer) {
    HEADROOM_RETURN_IF_ERROR(check(absl::StrCat(field, ".kept_from[", layer, "]"),
                                   count.kept_from[layer], sealed));
  }
  return absl::OkStatus();
}

absl::Status ExtentIndex::CommitSealed(std::span<const SealedCount> counts) {
  for (const SealedCount& count : counts) {
    const auto at = sequences_.find(count.sequence_id);
    if (at == sequences_.end()) return UnknownSequenceError(count.sequence_id);
    HEADROOM_RETURN_IF_ERROR(
        CheckCount(count, at->second, absl::StrCat("sequences[", &count - counts.data(), "]")));
  }
  for (const SealedCount& count : counts) {
    StoredSequence& sequence = sequences_[count.sequence_id];
    if (count.sealed_tokens > sequence.sealed_tokens) {
      const int64_t before = sequence.sealed_tokens;
      sequence.sealed_tokens = count.sealed_tokens;
      WriteSealed(sequence, before, count.sealed_tokens);
    }
    if (count.kept_from.empty()) continue;
    // The oldest first: what a store that dies in between has given back of a layer are its oldest.
    for (StoredRun& run : sequence.runs) Vacate(run, count.kept_from);
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> ExtentIndex::Truncate(uint64_t sequence_id, int64_t tokens) {
  const auto at = sequences_.find(sequence_id);
  if (at == sequences_.end()) return UnknownSequenceError(sequence_id);
  if (tokens < 0 || tokens % kBlockTokens != 0) {
    return BadRequestError({{"tokens", absl::StrCat("is ", tokens, ", expected a multiple of ",
                                                    kBlockTokens)}});
  }
  StoredSequence& sequence = at->second;
  for (const StoredRun& run : sequence.runs) {
    if (run.first_pos >= tokens || run.end_pos() <= tokens) continue;
    for (const StoredExtent& extent : run.extents) {
      if (!extent.vacated()) continue;
      return WithReason(
          absl::FailedPreconditionError(absl::StrCat("sequence ", sequence_id, ": keys of positions ",
                                                     run.first_pos, " to ", run.end_pos() - 1,
                                                     " were given back, ", tokens, " is among them")),
          "RUN_VACATED");
    }
  }
  const int64_t used_before = used_extents();
  while (!sequence.runs.empty() && sequence.runs.back().first_pos >= tokens) FreeLastRun(sequence);
  if (sequence.runs.empty()) {
    sequences_.erase(at);
  } else if (tokens < sequence.sealed_tokens) {
    const int64_t before = sequence.sealed_tokens;
    sequence.sealed_tokens = tokens;
    WriteSealed(sequence, tokens, before);
  }
  return used_before - used_extents();
}

int64_t ExtentIndex::Release(uint64_t sequence_id) {
  const auto at = sequences_.find(sequence_id);
  if (at == sequences_.end()) return 0;
  const int64_t used_before = used_extents();
  // From the end: what a store that dies in between has left is a sequence that is shorter.
  while (!at->second.runs.empty()) FreeLastRun(at->second);
  sequences_.erase(at);
  return used_before - used_extents();
}

// ---------------------------------------------------------------- invariants

std::string ExtentIndex::CheckInvariants() const {
  if (std::string wrong = allocator_.CheckInvariants(); !wrong.empty()) return wrong;
  std::vector<bool> used(descriptors_.size());
  std::map<int64_t, int64_t> ranges;  // offset -> bytes
  for (const auto& [id, sequence] : sequences_) {
    int64_t end = 0;
    std::vector<bool> kept(geometry_.num_layers);  // whether an older extent of the layer is there
    for (const StoredRun& run : sequence.runs) {
      if (run.first_pos != end) return absl::StrCat("sequence ", id, " has a hole at ", end);
      end = run.end_pos();
      for (uint32_t layer = 0; layer < run.extents.size(); ++layer) {
        const StoredExtent& extent = run.extents[layer];
        const ExtentDescriptor& descriptor = descriptors_[extent.extent_id];
        if (used[extent.extent_id]) return absl::StrCat("extent ", extent.extent_id, " used twice");
        used[extent.extent_id] = true;
        if (!extent.vacated()) {
          kept[layer] = true;
          ranges[extent.data_offset] = ExtentBytes(run.capacity_tokens);
        } else if (kept[layer] || run.end_pos() > sequence.sealed_tokens) {
          return absl::StrCat("extent ", extent.extent_id, " was given back too early");
        }
        if (descriptor.vacated != (extent.vacated() ? descriptor.commit : 0) ||
            (!extent.vacated() && static_cast<int64_t>(descriptor.data_offset) != extent.data_offset) ||
            descriptor.commit != CommitWordOf(descriptor) || descriptor.sequence_id != id ||
            descriptor.first_pos != run.first_pos || descriptor.layer != layer ||
            descriptor.capacity_tokens != run.capacity_tokens ||
            SealedTokens(descriptor.sealed) !=
                std::clamp<int64_t>(sequence.sealed_tokens - run.first_pos, 0,
                                    run.capacity_tokens)) {
          return absl::StrCat("descriptor ", extent.extent_id, " differs from memory");
        }
      }
    }
    if (sequence.sealed_tokens > end) return absl::StrCat("sequence ", id, " is sealed too far");
  }
  int64_t end = 0, bytes = 0;
  for (const auto& [offset, size] : ranges) {
    if (offset < end) return absl::StrCat("extents overlap at byte ", offset);
    end = offset + size;
    bytes += size;
  }
  if (bytes != used_bytes()) {
    return absl::StrCat(bytes, " bytes in extents, ", used_bytes(), " allocated");
  }
  for (size_t id = 0; id < used.size(); ++id) {
    if (!used[id] && descriptors_[id].commit != 0) return absl::StrCat("extent ", id, " leaked");
  }
  return "";
}

}  // namespace headroom::kvstore
