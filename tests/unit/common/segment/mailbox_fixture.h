// A mailbox in a folder of its own, and files that are almost one.
#ifndef HEADROOM_TESTS_UNIT_COMMON_SEGMENT_MAILBOX_FIXTURE_H_
#define HEADROOM_TESTS_UNIT_COMMON_SEGMENT_MAILBOX_FIXTURE_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <xxhash.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "common/segment/mailbox.h"
#include "common/segment_format.h"

namespace headroom {

inline constexpr uint64_t kGeneration = 41;
inline constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
inline constexpr absl::StatusCode kFailedPrecondition = absl::StatusCode::kFailedPrecondition;

inline MailboxShape SmallShape() {
  MailboxShape shape;
  shape.generation = kGeneration;
  shape.incarnation = 77;
  shape.geometry = {2, 2, 64};
  shape.num_q_heads = 6;
  shape.num_slots = 2;
  shape.tables_per_slot = 2;
  shape.max_rows = 3;
  shape.table_bytes = 1024;
  return shape;
}

// The bytes of a header, as they are in a file.
class HeaderBytes {
 public:
  MailboxHeader& operator*() { return *reinterpret_cast<MailboxHeader*>(bytes_); }
  MailboxHeader* operator->() { return reinterpret_cast<MailboxHeader*>(bytes_); }
  uint8_t* bytes() { return bytes_; }
  void Seal() { (*this)->checksum = XXH3_64bits(bytes_, offsetof(MailboxHeader, checksum)); }

 private:
  alignas(MailboxHeader) uint8_t bytes_[sizeof(MailboxHeader)] = {};
};

class MailboxTest : public testing::Test {
 protected:
  MailboxTest() {
    std::string name = "/dev/shm/headroom-test-XXXXXX";
    dir_ = mkdtemp(name.data());
  }
  ~MailboxTest() override { std::filesystem::remove_all(dir_); }

  std::string Path(const std::string& name) const { return dir_ + "/" + name; }
  bool Exists(const std::string& name) const { return std::filesystem::exists(Path(name)); }

  std::unique_ptr<Mailbox> Create(const MailboxShape& shape) {
    auto mailbox = Mailbox::Create(dir_, kName, shape);
    EXPECT_TRUE(mailbox.ok()) << mailbox.status();
    return mailbox.ok() ? *std::move(mailbox) : nullptr;
  }
  absl::StatusOr<std::unique_ptr<Mailbox>> Open(const KvGeometry& geometry = SmallShape().geometry,
                                                uint64_t generation = kGeneration) {
    return Mailbox::Open(dir_, kName, geometry, generation);
  }
  absl::StatusCode CodeOfOpen() { return Open().status().code(); }

  // A file with this header, written as the format says and not by a worker; its pages are holes,
  // so that it may be larger than the memory.
  void WriteFile(HeaderBytes& header, int64_t file_bytes) {
    const int fd = open(Path(kName).c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    ASSERT_EQ(ftruncate(fd, file_bytes), 0) << file_bytes;
    ASSERT_EQ(pwrite(fd, header.bytes(), sizeof(MailboxHeader), 0),
              static_cast<ssize_t>(sizeof(MailboxHeader)));
    close(fd);
  }
  static HeaderBytes HeaderOf(const MailboxShape& shape) {
    HeaderBytes header;
    header->magic = {'H', 'D', 'R', 'M', 'M', 'B', 'O', 'X'};
    header->format_version = 2;
    header->header_bytes = 4096;
    header->generation = shape.generation;
    header->incarnation = shape.incarnation;
    header->num_layers = shape.geometry.num_layers;
    header->num_q_heads = shape.num_q_heads;
    header->num_kv_heads = shape.geometry.num_kv_heads;
    header->head_dim = shape.geometry.head_dim;
    header->num_slots = shape.num_slots;
    header->tables_per_slot = shape.tables_per_slot;
    header->max_rows = shape.max_rows;
    header->query_encoding = 1;
    header->table_bytes = static_cast<uint64_t>(shape.table_bytes);
    header->slot_bytes = static_cast<uint64_t>(shape.slot_bytes());
    header->poster_wakes = shape.poster_wakes ? 1 : 0;
    header.Seal();
    return header;
  }
  // Open() of a good file but for one change, that the checksum agrees with.
  absl::StatusCode CodeOfForged(const std::function<void(MailboxHeader&)>& change) {
    HeaderBytes header = HeaderOf(SmallShape());
    change(*header);
    header.Seal();
    WriteFile(header, SmallShape().file_bytes());
    return CodeOfOpen();
  }
  // Open() of a file that is made for another shape as a whole: nothing in it contradicts another.
  absl::StatusCode CodeOfShape(const std::function<void(MailboxShape&)>& change) {
    MailboxShape shape = SmallShape();
    change(shape);
    HeaderBytes header = HeaderOf(shape);
    WriteFile(header, shape.file_bytes());
    return Open(shape.geometry, shape.generation).status().code();
  }

  static constexpr char kName[] = "mailbox-41-1";
  std::string dir_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_COMMON_SEGMENT_MAILBOX_FIXTURE_H_
