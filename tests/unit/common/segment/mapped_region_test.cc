#include "common/segment/mapped_region.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "common/fd.h"

namespace headroom {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

MappedRegion Map(int64_t bytes) {
  const Fd fd(memfd_create("mapped_region_test", MFD_CLOEXEC));
  EXPECT_EQ(ftruncate(fd.get(), bytes), 0);
  auto region = MappedRegion::Map(fd.get(), bytes, MappedRegion::Access::kReadWrite,
                                  /*huge_pages=*/true, "a test");
  EXPECT_TRUE(region.ok()) << region.status();
  return *std::move(region);
}

// The mapping of smaps that begins at `data`: its size and what huge pages hold of it, in bytes.
std::pair<int64_t, int64_t> SizeAndHuge(const uint8_t* data) {
  char begin[32];
  std::snprintf(begin, sizeof(begin), "%lx-", reinterpret_cast<unsigned long>(data));
  std::ifstream smaps("/proc/self/smaps");
  std::pair<int64_t, int64_t> found = {0, 0};
  bool ours = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.find('-') < line.find(' ')) ours = line.rfind(begin, 0) == 0;
    long kib = 0;
    if (ours && std::sscanf(line.c_str(), "Size: %ld kB", &kib) == 1) found.first = kib * 1024;
    if (ours && std::sscanf(line.c_str(), "ShmemPmdMapped: %ld kB", &kib) == 1) {
      found.second = kib * 1024;
    }
  }
  return found;
}

TEST(MappedRegion, BeginsWhereAHugePageCan) {
  for (const int64_t bytes : {int64_t{4096}, kHugePage, 3 * kHugePage + 100, int64_t{1} << 20}) {
    const MappedRegion region = Map(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(region.data()) % kHugePage, 0u);
    region.data()[bytes - 1] = 1;
    EXPECT_EQ(SizeAndHuge(region.data()).first, (bytes + 4095) / 4096 * 4096);
  }
}

// Without an advice or a mount option. What is there already stays.
TEST(MappedRegion, MakesHugePages) {
  const MappedRegion region = Map(4 * kHugePage + 4096);
  std::memset(region.data() + kHugePage, 7, 4096);
  region.MakeHugePages(0, region.bytes());
  EXPECT_EQ(region.data()[kHugePage + 4095], 7);
  EXPECT_EQ(region.data()[0], 0);
  // The library does not say whether this system collapses pages: ask it once more.
  if (madvise(region.data(), kHugePage, 25 /* MADV_COLLAPSE */) != 0) {
    GTEST_SKIP() << "the system makes no huge pages of shared memory: " << std::strerror(errno);
  }
  EXPECT_EQ(SizeAndHuge(region.data()).second, 4 * kHugePage);
}

}  // namespace
}  // namespace headroom
