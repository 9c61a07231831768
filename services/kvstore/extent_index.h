// Who owns which extent: the descriptors in the mapped index, and the same in memory.
//
// Memory is what is looked up; every change is also written to the descriptors, in an order such that a
// store that is killed at any instruction leaves runs that are whole, or that Recover() recognises as
// half-made and frees. What Recover() reads is hostile input: a descriptor that is damaged, out of
// range, overlaps another or belongs to a run with a layer missing is freed, never served.
//
// No I/O beside the descriptors. Not thread-safe.
#ifndef HEADROOM_SERVICES_KVSTORE_EXTENT_INDEX_H_
#define HEADROOM_SERVICES_KVSTORE_EXTENT_INDEX_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/segment_format.h"
#include "services/kvstore/extent_allocator.h"

namespace headroom::kvstore {

struct StoredExtent {
  uint32_t extent_id = 0;  // index of its descriptor
  int64_t data_offset = 0;  // kVacated: it has no bytes any more

  static constexpr int64_t kVacated = -1;
  bool vacated() const { return data_offset == kVacated; }
};

// The extents of all layers for positions [first_pos, first_pos + capacity_tokens).
struct StoredRun {
  int64_t first_pos = 0;
  int64_t capacity_tokens = 0;
  std::vector<StoredExtent> extents;  // by layer

  int64_t end_pos() const { return first_pos + capacity_tokens; }
};

// Runs follow each other from position 0. The vacated extents of a layer are its oldest, and all sealed.
struct StoredSequence {
  std::vector<StoredRun> runs;
  int64_t sealed_tokens = 0;  // keys [0, sealed_tokens) are in the runs; a multiple of kBlockTokens

  int64_t capacity_tokens() const { return runs.empty() ? 0 : runs.back().end_pos(); }
};

struct SealedCount {
  uint64_t sequence_id = 0;
  int64_t sealed_tokens = 0;
  // Per layer: nobody reads keys below any more. Empty: all are kept.
  std::vector<int64_t> kept_from = {};
};

struct RecoveryReport {
  int64_t kept_sequences = 0;
  int64_t kept_extents = 0;
  // Extents in use whose descriptors contradict themselves or others, and those of runs that are
  // incomplete or follow no other.
  int64_t damaged_extents = 0;
  int64_t incomplete_extents = 0;
};

class ExtentIndex {
 public:
  // REQUIRES: IsUsable(geometry); `descriptors` outlives the index, and nobody else writes them.
  ExtentIndex(std::span<ExtentDescriptor> descriptors, const KvGeometry& geometry);

  // Makes a part of the data file available; as ExtentAllocator::AddRange().
  void AddRange(int64_t begin, int64_t bytes) { allocator_.AddRange(begin, bytes); }

  // Takes over what the descriptors hold. REQUIRES: called once, after AddRange() of all that may be in
  // use and before anything else.
  RecoveryReport Recover();

  // Extents in all layers for positions [first_pos, first_pos + capacity_tokens): all or nothing.
  // Returns the run that is there if there is one with the same numbers and all its extents.
  // INVALID_ARGUMENT: a number is none that a run can have. FAILED_PRECONDITION: the run does not begin
  // where the last one ends.
  // RESOURCE_EXHAUSTED, with the numbers: no room, or no descriptors. The pointer is valid until the
  // next call that changes the index.
  absl::StatusOr<const StoredRun*> AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                               int64_t capacity_tokens);

  // Raises what is sealed; a smaller number than before changes nothing. Then vacates the extents that end
  // where their layer's kept_from begins or earlier. Of all sequences or of none: NOT_FOUND names an
  // unknown one, INVALID_ARGUMENT a count that is no multiple of 64 or beyond the runs, or a kept_from
  // beyond what is sealed.
  absl::Status CommitSealed(std::span<const SealedCount> counts);

  // Frees the runs that begin at `tokens` or later and lowers what is sealed to `tokens`. Returns how
  // many extents were freed. NOT_FOUND; INVALID_ARGUMENT: no multiple of 64. FAILED_PRECONDITION: the run
  // that would be cut has a vacated extent, whose keys could never be written anew.
  absl::StatusOr<int64_t> Truncate(uint64_t sequence_id, int64_t tokens);

  // Frees all extents of a sequence, and forgets it; 0 if it is unknown.
  int64_t Release(uint64_t sequence_id);

  const std::map<uint64_t, StoredSequence>& sequences() const { return sequences_; }
  const KvGeometry& geometry() const { return geometry_; }
  int64_t capacity_bytes() const { return allocator_.capacity_bytes(); }
  int64_t used_bytes() const { return allocator_.used_bytes(); }
  int64_t used_extents() const {
    return static_cast<int64_t>(descriptors_.size() - free_ids_.size());
  }

  // What contradicts itself between memory, descriptors and allocator; empty if nothing does. For
  // tests; O(extents).
  std::string CheckInvariants() const;

 private:
  int64_t ExtentBytes(int64_t capacity_tokens) const {
    return capacity_tokens * geometry_.BytesPerTokenPerLayer();
  }
  bool IsCapacity(int64_t tokens) const;
  absl::Status CheckNewRun(const StoredSequence* sequence, int64_t first_pos,
                           int64_t capacity_tokens) const;
  absl::Status CheckCount(const SealedCount& count, const StoredSequence& sequence,
                          const std::string& field) const;
  absl::Status FullError(int64_t capacity_tokens) const;

  // ---- Recovery, in this order.
  // Ids of the descriptors that are in use and make sense alone; the others are freed.
  std::vector<uint32_t> FindPlausible();
  bool IsPlausible(const ExtentDescriptor& descriptor) const;
  // Removes from `ids`, and frees, those whose bytes another one claims too: one of them lies.
  void DropOverlaps(std::vector<uint32_t>& ids);
  // Keeps the runs of one sequence that are whole and follow each other from position 0. `ids` are all
  // its extents, sorted by first position, capacity and layer.
  void KeepSequence(uint64_t sequence_id, std::span<const uint32_t> ids);
  // Whether its vacated extents, if it has some, follow only such, and keys that are all sealed.
  bool MayBeVacated(const StoredSequence& sequence, std::span<const uint32_t> ids) const;
  // False, and nothing happens, unless `ids` are one extent for each layer in order.
  bool KeepRun(StoredSequence& sequence, std::span<const uint32_t> ids);
  // Makes the list of free extents from what the sequences hold, and frees them in the file too.
  void FreeWhatIsNotKept();

  // ---- Writing descriptors.
  void Publish(uint32_t id, uint64_t sequence_id, const StoredRun& run, uint32_t layer);
  void Unpublish(uint32_t id) { StoreRelease(descriptors_[id].commit, 0); }
  // Writes the sealed counts of the runs that overlap positions [from, to).
  void WriteSealed(const StoredSequence& sequence, int64_t from, int64_t to);
  void FreeLastRun(StoredSequence& sequence);
  // The extents of `run` that end at or before their layer's kept_from.
  void Vacate(StoredRun& run, const std::vector<int64_t>& kept_from);

  const std::span<ExtentDescriptor> descriptors_;
  const KvGeometry geometry_;
  ExtentAllocator allocator_;
  std::map<uint64_t, StoredSequence> sequences_;
  std::vector<uint32_t> free_ids_;  // the next to be used last
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_EXTENT_INDEX_H_
