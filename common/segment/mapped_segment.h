// A segment as a process maps it that is not its store: the data to read and write, the index to read.
#ifndef HEADROOM_COMMON_SEGMENT_MAPPED_SEGMENT_H_
#define HEADROOM_COMMON_SEGMENT_MAPPED_SEGMENT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/segment/mapped_region.h"
#include "common/segment_format.h"

namespace headroom {

// What is wrong with a header that was read from an index file of `index_bytes` bytes, in words for an
// operator: FAILED_PRECONDITION for another format, DATA_LOSS for one that contradicts itself. The
// header is hostile input. A segment with no model bound is fine.
absl::Status CheckIndexHeader(const IndexHeader& header, int64_t index_bytes);

// What is bound, of a header that CheckIndexHeader() found fine. Its encoding must not be kUnbound.
SegmentBinding BindingOf(const IndexHeader& header);
// 32 hexadecimal digits.
std::string FingerprintText(const std::array<uint8_t, 16>& fingerprint);

// Thread-safe: constant but for the words that the store writes.
class MappedSegment {
 public:
  // Maps the segment in folder `dir`. FAILED_PRECONDITION if format, model, geometry or generation
  // differ from what is expected; NOT_FOUND without files; DATA_LOSS if they contradict each other.
  static absl::StatusOr<std::unique_ptr<MappedSegment>> Open(const std::string& dir,
                                                             const SegmentBinding& expected,
                                                             uint64_t generation);

  // All extents' bytes. Only those below ready_bytes() are backed by memory; extents that the store has
  // handed out are. To be registered with a device in pieces of kRegistrationBytes, each once it is
  // ready.
  uint8_t* data() const { return data_.data(); }
  int64_t data_bytes() const { return data_.bytes(); }
  int64_t ready_bytes() const;

  uint64_t generation() const { return generation_; }
  const SegmentBinding& binding() const { return binding_; }

  // The store's generation now: another one if it has been started anew on the same files.
  uint64_t current_generation() const { return LoadAcquire(header().generation); }

 private:
  MappedSegment() = default;
  const IndexHeader& header() const {
    return *reinterpret_cast<const IndexHeader*>(index_.data());
  }

  // Constant after Open().
  MappedRegion index_;  // its header, read-only
  MappedRegion data_;
  SegmentBinding binding_;
  uint64_t generation_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_SEGMENT_MAPPED_SEGMENT_H_
