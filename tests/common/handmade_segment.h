// A segment's files, written as docs/segment.md says and not by a store.
#ifndef HEADROOM_TESTS_COMMON_HANDMADE_SEGMENT_H_
#define HEADROOM_TESTS_COMMON_HANDMADE_SEGMENT_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "common/segment/mapped_segment.h"
#include "common/segment_format.h"

namespace headroom {

// In a folder of its own, removed in the end. 2 layers of 3 KV heads of 64 dimensions; of the data, which has no
// memory before it is touched, `ready_bytes` are said to be ready.
class HandmadeSegment {
 public:
  HandmadeSegment(int64_t data_bytes, int64_t ready_bytes, uint64_t generation) {
    std::string name = "/dev/shm/headroom-test-XXXXXX";
    dir_ = mkdtemp(name.data());
    const int data = open((dir_ + "/data").c_str(), O_RDWR | O_CREAT, 0600);
    EXPECT_EQ(ftruncate(data, data_bytes), 0);
    struct stat stat = {};
    fstat(data, &stat);
    close(data);
    header.magic = kIndexMagic;
    header.format_version = kSegmentFormatVersion;
    header.header_bytes = 4096;
    header.descriptor_bytes = 64;
    header.max_extents = 10;
    header.data_bytes = data_bytes;
    header.data_inode = stat.st_ino;
    header.encoding = 1;
    header.num_layers = 2;
    header.num_kv_heads = 3;
    header.head_dim = 64;
    header.fingerprint.fill(9);
    header.checksum = ChecksumOf(header);
    header.generation = generation;
    header.ready_bytes = ready_bytes;
    WriteIndex();
  }
  ~HandmadeSegment() { std::filesystem::remove_all(dir_); }
  HandmadeSegment(const HandmadeSegment&) = delete;
  HandmadeSegment& operator=(const HandmadeSegment&) = delete;

  const std::string& dir() const { return dir_; }
  // What its header names.
  static SegmentBinding Binding() {
    SegmentBinding binding;
    binding.geometry = {2, 3, 64};
    binding.fingerprint.fill(9);
    return binding;
  }
  // `header`, as it is now, to the file.
  void WriteIndex() const {
    const int fd = open((dir_ + "/index").c_str(), O_RDWR | O_CREAT, 0600);
    EXPECT_EQ(ftruncate(fd, IndexBytes(10)), 0);
    EXPECT_EQ(pwrite(fd, &header, sizeof(header), 0), 4096);
    close(fd);
  }

  IndexHeader header = {};

 private:
  std::string dir_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_HANDMADE_SEGMENT_H_
