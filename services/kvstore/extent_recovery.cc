// ExtentIndex::Recover() and what it is made of.
#include <algorithm>
#include <tuple>

#include "common/checked_math.h"
#include "services/kvstore/extent_index.h"

namespace headroom::kvstore {
namespace {

// The end of the elements from `begin` on for which same(first, element) holds.
template <typename Same>
size_t GroupEnd(std::span<const uint32_t> ids, size_t begin, Same same) {
  size_t end = begin + 1;
  while (end < ids.size() && same(ids[begin], ids[end])) ++end;
  return end;
}

}  // namespace

RecoveryReport ExtentIndex::Recover() {
  RecoveryReport report;
  for (const ExtentDescriptor& descriptor : descriptors_) {
    if (LoadAcquire(descriptor.commit) != 0) ++report.damaged_extents;
  }
  std::vector<uint32_t> ids = FindPlausible();
  DropOverlaps(ids);
  report.damaged_extents -= static_cast<int64_t>(ids.size());
  std::sort(ids.begin(), ids.end(), [this](uint32_t a, uint32_t b) {
    const auto key = [](const ExtentDescriptor& descriptor) {
      return std::tie(descriptor.sequence_id, descriptor.first_pos, descriptor.capacity_tokens,
                      descriptor.layer);
    };
    return key(descriptors_[a]) < key(descriptors_[b]);
  });
  for (size_t begin = 0; begin < ids.size();) {
    const size_t end = GroupEnd(ids, begin, [this](uint32_t a, uint32_t b) {
      return descriptors_[a].sequence_id == descriptors_[b].sequence_id;
    });
    KeepSequence(descriptors_[ids[begin]].sequence_id,
                 std::span<const uint32_t>(ids).subspan(begin, end - begin));
    begin = end;
  }
  FreeWhatIsNotKept();
  report.kept_sequences = static_cast<int64_t>(sequences_.size());
  report.kept_extents = used_extents();
  report.incomplete_extents = static_cast<int64_t>(ids.size()) - report.kept_extents;
  return report;
}

bool ExtentIndex::IsPlausible(const ExtentDescriptor& descriptor) const {
  if (descriptor.commit != CommitWordOf(descriptor)) return false;
  const std::optional<int64_t> sealed = SealedTokens(descriptor.sealed);
  return descriptor.sequence_id != 0 && IsCapacity(descriptor.capacity_tokens) &&
         descriptor.layer < static_cast<uint32_t>(geometry_.num_layers) &&
         descriptor.first_pos >= 0 && descriptor.first_pos <= kMaxPositions &&
         descriptor.first_pos % kBlockTokens == 0 && sealed.has_value() &&
         *sealed % kBlockTokens == 0 && *sealed <= descriptor.capacity_tokens &&
         (descriptor.vacated == 0 || (descriptor.vacated == descriptor.commit &&
                                      *sealed == descriptor.capacity_tokens)) &&
         descriptor.bytes == static_cast<uint64_t>(ExtentBytes(descriptor.capacity_tokens)) &&
         descriptor.data_offset <= static_cast<uint64_t>(INT64_MAX) &&
         CheckedAdd(static_cast<int64_t>(descriptor.data_offset),
                    static_cast<int64_t>(descriptor.bytes))
             .has_value();
}

std::vector<uint32_t> ExtentIndex::FindPlausible() {
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < descriptors_.size(); ++id) {
    if (LoadAcquire(descriptors_[id].commit) == 0) continue;
    if (IsPlausible(descriptors_[id])) {
      ids.push_back(id);
    } else {
      Unpublish(id);
    }
  }
  return ids;
}

void ExtentIndex::DropOverlaps(std::vector<uint32_t>& ids) {
  std::sort(ids.begin(), ids.end(), [this](uint32_t a, uint32_t b) {
    return descriptors_[a].data_offset < descriptors_[b].data_offset;
  });
  std::vector<bool> overlaps(ids.size());
  uint64_t end = 0;
  size_t farthest = 0;  // which one ends there
  for (size_t i = 0; i < ids.size(); ++i) {
    const ExtentDescriptor& descriptor = descriptors_[ids[i]];
    if (descriptor.vacated != 0) continue;  // claims nothing
    if (descriptor.data_offset < end) overlaps[i] = overlaps[farthest] = true;
    if (descriptor.data_offset + descriptor.bytes > end) {
      end = descriptor.data_offset + descriptor.bytes;
      farthest = i;
    }
  }
  size_t kept = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (overlaps[i]) {
      Unpublish(ids[i]);
    } else {
      ids[kept++] = ids[i];
    }
  }
  ids.resize(kept);
}

void ExtentIndex::KeepSequence(uint64_t sequence_id, std::span<const uint32_t> ids) {
  StoredSequence sequence;
  for (size_t begin = 0; begin < ids.size();) {
    const size_t end = GroupEnd(ids, begin, [this](uint32_t a, uint32_t b) {
      return descriptors_[a].first_pos == descriptors_[b].first_pos &&
             descriptors_[a].capacity_tokens == descriptors_[b].capacity_tokens;
    });
    const int64_t first_pos = descriptors_[ids[begin]].first_pos;
    if (first_pos > sequence.capacity_tokens()) break;  // a hole
    // A run that is not whole may stand beside a whole one of another capacity: so look further.
    if (first_pos == sequence.capacity_tokens()) KeepRun(sequence, ids.subspan(begin, end - begin));
    begin = end;
  }
  if (sequence.runs.empty()) return;
  WriteSealed(sequence, 0, sequence.capacity_tokens());
  sequences_.emplace(sequence_id, std::move(sequence));
}

bool ExtentIndex::MayBeVacated(const StoredSequence& sequence,
                               std::span<const uint32_t> ids) const {
  bool vacated = false, full = sequence.sealed_tokens == sequence.capacity_tokens();
  for (size_t layer = 0; layer < ids.size(); ++layer) {
    const ExtentDescriptor& descriptor = descriptors_[ids[layer]];
    full = full && SealedTokens(descriptor.sealed) == int64_t{descriptor.capacity_tokens};
    if (descriptor.vacated == 0) continue;
    vacated = true;
    if (!sequence.runs.empty() && !sequence.runs.back().extents[layer].vacated()) return false;
  }
  return full || !vacated;
}

bool ExtentIndex::KeepRun(StoredSequence& sequence, std::span<const uint32_t> ids) {
  if (ids.size() != static_cast<size_t>(geometry_.num_layers) || !MayBeVacated(sequence, ids)) {
    return false;
  }
  StoredRun run = {descriptors_[ids[0]].first_pos, descriptors_[ids[0]].capacity_tokens, {}};
  const int64_t bytes = ExtentBytes(run.capacity_tokens);
  int64_t sealed = run.capacity_tokens;
  for (uint32_t layer = 0; layer < ids.size(); ++layer) {
    const ExtentDescriptor& descriptor = descriptors_[ids[layer]];
    const bool vacated = descriptor.vacated != 0;
    const auto offset = static_cast<int64_t>(descriptor.data_offset);
    if (descriptor.layer != layer || (!vacated && !allocator_.Reserve(offset, bytes))) {
      for (const StoredExtent& extent : run.extents) {
        if (!extent.vacated()) allocator_.Free(extent.data_offset, bytes);
      }
      return false;
    }
    run.extents.push_back({ids[layer], vacated ? StoredExtent::kVacated : offset});
    sealed = std::min(sealed, SealedTokens(descriptor.sealed).value_or(0));
  }
  // Sealed is what all layers have sealed, without a gap.
  if (sequence.sealed_tokens == run.first_pos) sequence.sealed_tokens += sealed;
  sequence.runs.push_back(std::move(run));
  return true;
}

void ExtentIndex::FreeWhatIsNotKept() {
  std::vector<bool> kept(descriptors_.size());
  for (const auto& [sequence_id, sequence] : sequences_) {
    for (const StoredRun& run : sequence.runs) {
      for (const StoredExtent& extent : run.extents) kept[extent.extent_id] = true;
    }
  }
  free_ids_.clear();
  for (size_t id = kept.size(); id-- > 0;) {
    if (kept[id]) continue;
    Unpublish(static_cast<uint32_t>(id));
    free_ids_.push_back(static_cast<uint32_t>(id));
  }
}

}  // namespace headroom::kvstore
