// The segment's files as their store has them: made or taken over, locked, mapped, filled with memory.
//
// Thread rule: Prefault() may run on one thread beside the others; the rest is for the owner's thread.
#ifndef HEADROOM_SERVICES_KVSTORE_SEGMENT_H_
#define HEADROOM_SERVICES_KVSTORE_SEGMENT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/fd.h"
#include "common/segment/mapped_region.h"
#include "common/segment_format.h"

namespace headroom::kvstore {

struct SegmentOptions {
  std::string dir;  // made, with mode 0700, if it is not there
  int64_t data_bytes = 0;
  int64_t max_extents = 0;
  uint64_t generation = 0;  // 0: a new one is drawn
};

// INVALID_ARGUMENT: a number is out of range.
absl::Status CheckSegmentOptions(const SegmentOptions& options);

class Segment {
 public:
  // Locks the folder and takes its files over if they fit the options, else makes new ones.
  // INVALID_ARGUMENT as CheckSegmentOptions(). ALREADY_EXISTS: another store holds the folder, which
  // is found out at once. RESOURCE_EXHAUSTED: there is not so much memory; names --host-memory and
  // --segment-dir. PERMISSION_DENIED and the like: the system's refusal.
  static absl::StatusOr<std::unique_ptr<Segment>> Open(const SegmentOptions& options);

  const std::string& dir() const { return dir_; }  // absolute
  uint64_t generation() const { return generation_; }
  int64_t data_bytes() const { return data_.bytes(); }
  const uint8_t* data() const { return data_.data(); }
  // Why the files are new, in words; empty if an earlier store's were taken over.
  const std::string& why_new() const { return why_new_; }

  // Whose keys the segment holds, if it is bound.
  std::optional<SegmentBinding> binding() const;
  // REQUIRES: no descriptor is in use.
  void Bind(const SegmentBinding& binding);
  std::span<ExtentDescriptor> descriptors() const;

  // Backs bytes [ready_bytes(), end) of the data with memory, step by step, until `stop` is set. May
  // take seconds for each GiB. RESOURCE_EXHAUSTED if memory ran out; what was got before stays.
  absl::Status Prefault(int64_t end, const std::atomic<bool>& stop);
  int64_t ready_bytes() const;

  // Bytes of the data that this process has mapped with huge pages. Walks page tables: some 10 ms for
  // each 64 GiB of small pages.
  int64_t CountHugePageBytes() const;

 private:
  Segment() = default;

  absl::Status OpenFolder(const std::string& dir);
  // Why the files in the folder cannot be taken over; empty if they can.
  std::string TryTakeOver(const SegmentOptions& options);
  absl::Status CheckMemory(const SegmentOptions& options) const;
  absl::Status MakeFiles(const SegmentOptions& options);
  absl::Status MapFiles(const SegmentOptions& options);
  absl::Status BeginGeneration(uint64_t asked);
  IndexHeader& header() const { return *reinterpret_cast<IndexHeader*>(index_.data()); }
  void WriteFixedHeader(const IndexHeader& header);

  // Constant after Open().
  std::string dir_;
  std::string why_new_;
  uint64_t generation_ = 0;
  Fd dir_fd_;  // holds the lock
  Fd index_fd_;
  Fd data_fd_;
  MappedRegion index_;
  MappedRegion data_;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_SEGMENT_H_
