#include "common/segment/mapped_region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace headroom {

namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Maps at an address where huge pages can begin: a system maps small pages anywhere.
void* MapAligned(int64_t bytes, int protection, int fd) {
  const size_t room = static_cast<size_t>(bytes) + kHugePage;
  void* const reserved =
      mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return MAP_FAILED;
  const auto begin = reinterpret_cast<uintptr_t>(reserved);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  void* const data = mmap(reinterpret_cast<void*>(aligned), static_cast<size_t>(bytes), protection,
                          MAP_SHARED | MAP_FIXED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    munmap(reserved, room);
    errno = error;
    return MAP_FAILED;
  }
  if (aligned > begin) munmap(reserved, aligned - begin);
  // What is left behind the mapping's last page.
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t end = (aligned + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  if (begin + room > end) munmap(reinterpret_cast<void*>(end), begin + room - end);
  return data;
}

}  // namespace

absl::StatusOr<MappedRegion> MappedRegion::Map(int fd, int64_t bytes, Access access,
                                               bool huge_pages, absl::string_view what) {
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = huge_pages ? MapAligned(bytes, protection, fd)
                                : mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_SHARED,
                                       fd, 0);
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

void MappedRegion::MakeHugePages(int64_t begin, int64_t bytes) const {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which Debian 12's headers lack
  constexpr int64_t kStep = static_cast<int64_t>(kHugePage);
  const int64_t end = (begin + bytes) / kStep * kStep;
  begin = (begin + kStep - 1) / kStep * kStep;
  // Linux collapses only where some page is: one is enough, and faster than all of them.
  for (int64_t at = begin; at < end; at += kStep) {
    if (madvise(data_ + at, 1, MADV_POPULATE_WRITE) != 0) return;
  }
  if (end > begin) madvise(data_ + begin, static_cast<size_t>(end - begin), kCollapse);
}

void MappedRegion::Reset() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace headroom
