#include "common/segment/mapped_region.h"

#include <sys/mman.h>

#include <cerrno>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace headroom {

absl::StatusOr<MappedRegion> MappedRegion::Map(int fd, int64_t bytes, Access access,
                                               bool huge_pages, absl::string_view what) {
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno, absl::StrCat("mapping ", bytes, " bytes of ", what));
  }
  MappedRegion region;
  region.data_ = static_cast<uint8_t*>(data);
  region.bytes_ = bytes;
  // Advice: a system that does not follow it works all the same.
  madvise(data, static_cast<size_t>(bytes), MADV_DONTDUMP);
  if (huge_pages) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return region;
}

void MappedRegion::Reset() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace headroom
