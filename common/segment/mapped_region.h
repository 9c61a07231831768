// A shared mapping of a file that unmaps itself.
#ifndef HEADROOM_COMMON_SEGMENT_MAPPED_REGION_H_
#define HEADROOM_COMMON_SEGMENT_MAPPED_REGION_H_

#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headroom {

class MappedRegion {
 public:
  enum class Access { kRead, kReadWrite };

  // The first `bytes` of the file, left out of core dumps: they hold what users wrote. Huge pages are
  // asked for where `huge_pages` says; whether there are any is the system's choice. RESOURCE_EXHAUSTED
  // if there is no address space; errors name `what`.
  static absl::StatusOr<MappedRegion> Map(int fd, int64_t bytes, Access access, bool huge_pages,
                                          absl::string_view what);

  MappedRegion() = default;
  ~MappedRegion() { Reset(); }
  MappedRegion(MappedRegion&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  MappedRegion& operator=(MappedRegion&& other) noexcept {
    if (this != &other) {
      Reset();
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
  }

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // Backs a range with huge pages at once, if the system can (Linux 6.1): unlike the advice, which
  // follows how the file system was mounted, this works on /dev/shm as systems mount it. What can't
  // be had stays as it is.
  void MakeHugePages(int64_t begin, int64_t bytes) const;
  void Reset();

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_SEGMENT_MAPPED_REGION_H_
