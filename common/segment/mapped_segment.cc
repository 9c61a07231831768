#include "common/segment/mapped_segment.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/fd.h"
#include "common/status.h"

namespace headroom {
namespace {

absl::StatusOr<Fd> OpenFile(const std::string& path, int flags) {
  Fd fd(open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, absl::StrCat("opening ", path));
  return fd;
}

std::string Text(const KvGeometry& geometry) {
  return absl::StrCat(geometry.num_layers, " layers x ", geometry.num_kv_heads, " KV heads x ",
                      geometry.head_dim);
}

absl::Status CheckBinding(const SegmentBinding& found, const SegmentBinding& expected) {
  if (!(found.geometry == expected.geometry) || found.first_layer != expected.first_layer ||
      found.first_kv_head != expected.first_kv_head) {
    return absl::FailedPreconditionError(
        absl::StrCat("the segment holds keys of ", Text(found.geometry), " from layer ",
                     found.first_layer, ", KV head ", found.first_kv_head, "; expected ",
                     Text(expected.geometry), " from ", expected.first_layer, ", ",
                     expected.first_kv_head));
  }
  if (found.fingerprint != expected.fingerprint) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the segment holds keys of model ", FingerprintText(found.fingerprint), "; expected ",
        FingerprintText(expected.fingerprint)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckIndexHeader(const IndexHeader& header, int64_t index_bytes) {
  if (header.magic != kIndexMagic) {
    return absl::FailedPreconditionError("the index is no index of a Headroom segment");
  }
  if (header.format_version != kSegmentFormatVersion ||
      header.header_bytes != sizeof(IndexHeader) ||
      header.descriptor_bytes != sizeof(ExtentDescriptor)) {
    return absl::FailedPreconditionError(absl::StrCat("the index has format ",
                                                      header.format_version, "; expected ",
                                                      kSegmentFormatVersion));
  }
  if (header.checksum != ChecksumOf(header)) {
    return absl::DataLossError("the index header's checksum is wrong");
  }
  const auto data_bytes = static_cast<int64_t>(header.data_bytes);
  if (data_bytes <= 0 || header.max_extents == 0 || IndexBytes(header.max_extents) > index_bytes) {
    return absl::DataLossError(absl::StrCat("the index names ", header.max_extents, " extents and ",
                                            header.data_bytes, " bytes of data in a file of ",
                                            index_bytes, " bytes"));
  }
  if (header.encoding == kUnbound) return absl::OkStatus();
  const KvGeometry geometry = BindingOf(header).geometry;
  if (header.encoding != kEncodingBFloat16) {
    return absl::FailedPreconditionError(
        absl::StrCat("the index names encoding ", header.encoding, "; expected bfloat16 (",
                     kEncodingBFloat16, ")"));
  }
  if (!IsUsable(geometry) || header.first_layer < 0 || header.first_kv_head < 0) {
    return absl::DataLossError(absl::StrCat("the index names an impossible geometry, ",
                                            Text(geometry)));
  }
  return absl::OkStatus();
}

SegmentBinding BindingOf(const IndexHeader& header) {
  SegmentBinding binding;
  binding.geometry = {header.num_layers, header.num_kv_heads, header.head_dim};
  binding.fingerprint = header.fingerprint;
  binding.first_layer = header.first_layer;
  binding.first_kv_head = header.first_kv_head;
  return binding;
}

std::string FingerprintText(const std::array<uint8_t, 16>& fingerprint) {
  return absl::BytesToHexString(absl::string_view(
      reinterpret_cast<const char*>(fingerprint.data()), fingerprint.size()));
}

absl::StatusOr<std::unique_ptr<MappedSegment>> MappedSegment::Open(const std::string& dir,
                                                                   const SegmentBinding& expected,
                                                                   uint64_t generation) {
  HEADROOM_ASSIGN_OR_RETURN(const Fd index, OpenFile(absl::StrCat(dir, "/", kIndexFile), O_RDONLY));
  HEADROOM_ASSIGN_OR_RETURN(const Fd data, OpenFile(absl::StrCat(dir, "/", kDataFile), O_RDWR));
  struct stat index_stat = {}, data_stat = {};
  if (fstat(index.get(), &index_stat) != 0 || fstat(data.get(), &data_stat) != 0) {
    return absl::ErrnoToStatus(errno, "fstat of the segment's files");
  }
  if (index_stat.st_size < static_cast<off_t>(sizeof(IndexHeader))) {
    return absl::DataLossError(absl::StrCat("the index has only ", index_stat.st_size, " bytes"));
  }
  std::unique_ptr<MappedSegment> segment(new MappedSegment());
  HEADROOM_ASSIGN_OR_RETURN(
      segment->index_, MappedRegion::Map(index.get(), sizeof(IndexHeader),
                                         MappedRegion::Access::kRead, false, kIndexFile));
  // A copy is judged, so that what was judged is what is used. The store writes the checksum last and
  // erases it first: a header that it is about to change fails the check.
  IndexHeader header;
  LoadAcquire(segment->header().checksum);
  std::memcpy(static_cast<void*>(&header), &segment->header(), sizeof(header));
  HEADROOM_RETURN_IF_ERROR(CheckIndexHeader(header, index_stat.st_size));
  if (header.encoding == kUnbound) {
    return absl::FailedPreconditionError("the segment is bound to no model yet");
  }
  segment->binding_ = BindingOf(header);
  HEADROOM_RETURN_IF_ERROR(CheckBinding(segment->binding_, expected));
  segment->generation_ = segment->current_generation();
  if (segment->generation_ != generation) {
    return absl::FailedPreconditionError(
        absl::StrCat("the segment's store has generation ", segment->generation_, "; expected ",
                     generation));
  }
  if (header.data_inode != data_stat.st_ino ||
      static_cast<int64_t>(header.data_bytes) != data_stat.st_size) {
    return absl::DataLossError("the data file is not the one that the index belongs to");
  }
  HEADROOM_ASSIGN_OR_RETURN(
      segment->data_, MappedRegion::Map(data.get(), data_stat.st_size,
                                        MappedRegion::Access::kReadWrite, true, kDataFile));
  return segment;
}

int64_t MappedSegment::ready_bytes() const {
  const uint64_t ready = LoadAcquire(header().ready_bytes);
  return static_cast<int64_t>(std::min(ready, static_cast<uint64_t>(data_.bytes())));
}

}  // namespace headroom
