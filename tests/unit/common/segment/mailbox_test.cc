#include "common/segment/mailbox.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/futex.h"
#include "common/segment_format.h"
#include "kernels/attention.h"

namespace headroom {
namespace {

constexpr uint64_t kGeneration = 41;
constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
constexpr absl::StatusCode kFailedPrecondition = absl::StatusCode::kFailedPrecondition;

MailboxShape SmallShape() {
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

// ---------------------------------------------------------------- making and mapping

TEST_F(MailboxTest, WhatOneSideWritesTheOtherReads) {
  const std::unique_ptr<Mailbox> made = Create(SmallShape());
  ASSERT_NE(made, nullptr);
  const auto opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.status();
  const MailboxShape& shape = (*opened)->shape();
  EXPECT_EQ(shape.generation, kGeneration);
  EXPECT_EQ(shape.incarnation, 77u);
  EXPECT_TRUE(shape.geometry == SmallShape().geometry);
  EXPECT_EQ(shape.num_q_heads, 6);
  EXPECT_EQ(shape.num_slots, 2u);
  EXPECT_EQ(shape.tables_per_slot, 2u);
  EXPECT_EQ(shape.max_rows, 3u);
  EXPECT_EQ(shape.table_bytes, 1024);
  EXPECT_TRUE(shape.poster_wakes);
  EXPECT_EQ((*opened)->bytes(), made->bytes());
  EXPECT_EQ(made->header().attached, 0u);
  (*opened)->header().attached.store(kGeneration);
  EXPECT_EQ(made->header().attached, kGeneration);
  for (uint32_t slot = 0; slot < 2; ++slot) {
    EXPECT_EQ((*opened)->slot(slot).posted, 0u);
    made->slot(slot).post.step = 100 + slot;
    made->queries(slot)[0] = 1.5f + static_cast<float>(slot);
    (*opened)->partials(slot)[0] = 2.5f + static_cast<float>(slot);
    for (uint32_t table = 0; table < 2; ++table) {
      made->table(slot, table)[0] = static_cast<uint8_t>(10 * slot + table + 1);
    }
  }
  for (uint32_t slot = 0; slot < 2; ++slot) {
    EXPECT_EQ((*opened)->slot(slot).post.step, 100 + slot);
    EXPECT_EQ((*opened)->queries(slot)[0], 1.5f + static_cast<float>(slot));
    EXPECT_EQ(made->partials(slot)[0], 2.5f + static_cast<float>(slot));
    for (uint32_t table = 0; table < 2; ++table) {
      EXPECT_EQ((*opened)->table(slot, table)[0], 10 * slot + table + 1);
    }
  }
}

TEST_F(MailboxTest, APosterThatWakesNobodySaysSo) {
  MailboxShape shape = SmallShape();
  shape.poster_wakes = false;
  ASSERT_NE(Create(shape), nullptr);
  const auto opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_FALSE((*opened)->shape().poster_wakes);
}

TEST_F(MailboxTest, ThePlacesOfASlotLieApartAndInsideTheFile) {
  for (const uint32_t rows : {1u, 3u, 64u}) {
    for (const int64_t table_bytes : {int64_t{128}, int64_t{4096}, int64_t{5056}}) {
      MailboxShape shape = SmallShape();
      shape.max_rows = rows;
      shape.table_bytes = table_bytes;
      const std::unique_ptr<Mailbox> mailbox = Create(shape);
      ASSERT_NE(mailbox, nullptr);
      struct Place {
        int64_t begin, bytes;
      };
      std::vector<Place> places = {{0, sizeof(MailboxHeader)}};
      const auto add = [&](const void* at, int64_t bytes) {
        places.push_back({static_cast<const uint8_t*>(at) - mailbox->data(), bytes});
      };
      for (uint32_t slot = 0; slot < shape.num_slots; ++slot) {
        add(&mailbox->slot(slot), sizeof(MailboxSlot));
        for (uint32_t table = 0; table < shape.tables_per_slot; ++table) {
          add(mailbox->table(slot, table), table_bytes);
        }
        add(mailbox->queries(slot), rows * 6 * 64 * 4);
        add(mailbox->partials(slot), rows * 6 * kernels::AttentionStateFloats(64) * 4);
        // A device may copy to them in whole pages' worth of alignment.
        EXPECT_EQ((mailbox->queries(slot) - reinterpret_cast<float*>(mailbox->data())) % 1024, 0);
        EXPECT_EQ((mailbox->partials(slot) - reinterpret_cast<float*>(mailbox->data())) % 1024, 0);
      }
      std::sort(places.begin(), places.end(),
                [](const Place& a, const Place& b) { return a.begin < b.begin; });
      for (size_t i = 1; i < places.size(); ++i) {
        EXPECT_LE(places[i - 1].begin + places[i - 1].bytes, places[i].begin);
      }
      EXPECT_LE(places.back().begin + places.back().bytes, mailbox->bytes());
      EXPECT_EQ(static_cast<int64_t>(std::filesystem::file_size(Path(kName))), mailbox->bytes());
      std::memset(mailbox->data() + sizeof(MailboxHeader), 0xab,
                  mailbox->bytes() - sizeof(MailboxHeader));
    }
  }
}

TEST_F(MailboxTest, OnlyItsUserMayReadIt) {
  const mode_t before = umask(0);
  ASSERT_NE(Create(SmallShape()), nullptr);
  umask(before);
  struct stat stat = {};
  ASSERT_EQ(::stat(Path(kName).c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 07777, 0600u);
}

TEST_F(MailboxTest, MakingOneUnlinksTheOthersAndNothingElse) {
  for (const char* const name :
       {"index", "data", "mailbo", "xmailbox-1-1", "mailbox-1-1", "mailbox-41-1", "mailbox-junk"}) {
    std::ofstream(Path(name)) << "old";
  }
  std::filesystem::create_directory(Path("mailbox-folder"));
  ASSERT_NE(Create(SmallShape()), nullptr);
  EXPECT_FALSE(Exists("mailbox-1-1"));
  EXPECT_FALSE(Exists("mailbox-junk"));
  for (const char* const name : {"index", "data", "mailbo", "xmailbox-1-1", "mailbox-folder"}) {
    EXPECT_TRUE(Exists(name)) << name;
  }
  EXPECT_TRUE(Open().ok()) << "not the old file of that name";
}

TEST_F(MailboxTest, OneThatIsUnlinkedStaysMapped) {
  const std::unique_ptr<Mailbox> old = Create(SmallShape());
  ASSERT_NE(old, nullptr);
  ASSERT_TRUE(Mailbox::Create(dir_, "mailbox-41-2", SmallShape()).ok());
  EXPECT_FALSE(Exists(kName));
  std::memset(old->data() + sizeof(MailboxHeader), 1, old->bytes() - sizeof(MailboxHeader));
  EXPECT_EQ(CodeOfOpen(), absl::StatusCode::kNotFound);
}

TEST_F(MailboxTest, OneWithoutANameIsLikeAnyOtherToItsProcess) {
  const auto first = Mailbox::CreateUnnamed(SmallShape());
  const auto second = Mailbox::CreateUnnamed(SmallShape());
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ((*first)->bytes(), SmallShape().file_bytes());
  EXPECT_EQ((*first)->shape().max_rows, 3u);
  RingPosted((*first)->header(), (*first)->slot(1), 4);
  EXPECT_EQ((*first)->slot(1).posted, 4u);
  EXPECT_EQ((*second)->slot(1).posted, 0u);
  EXPECT_TRUE(std::filesystem::is_empty(dir_));
}

TEST_F(MailboxTest, AFolderWithoutRoomSaysSoAndKeepsNoFile) {
  MailboxShape shape = SmallShape();
  shape.table_bytes = int64_t{1} << 44;
  const absl::Status status = Mailbox::Create(dir_, kName, shape).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find(absl::StrCat(shape.file_bytes())), std::string::npos) << status;
  EXPECT_NE(status.message().find("--segment-dir"), std::string::npos) << status;
  EXPECT_FALSE(Exists(kName));
}

TEST_F(MailboxTest, AFolderThatIsNotThereIsNotMade) {
  EXPECT_TRUE(absl::IsNotFound(Mailbox::Create(dir_ + "/none", kName, SmallShape()).status()));
  EXPECT_TRUE(absl::IsNotFound(
      Mailbox::Open(dir_ + "/none", kName, SmallShape().geometry, kGeneration).status()));
}

// ---------------------------------------------------------------- what is refused

TEST_F(MailboxTest, NamesThatAreNoMailboxesAreRefused) {
  ASSERT_NE(Create(SmallShape()), nullptr);
  const auto code = [this](const std::string& name) {
    return Mailbox::Open(dir_, name, SmallShape().geometry, kGeneration).status().code();
  };
  const std::string base = std::filesystem::path(dir_).filename();
  for (const std::string& name :
       {std::string(), std::string("."), std::string("mailbox"), std::string("index"),
        std::string("Mailbox-41-1"), std::string(" mailbox-41-1"), std::string("./mailbox-41-1"),
        absl::StrCat("../", base, "/mailbox-41-1"), absl::StrCat("mailbox-/../", kName),
        absl::StrCat(kName, "/"), std::string("/etc/passwd"), Path(kName)}) {
    EXPECT_EQ(code(name), absl::StatusCode::kInvalidArgument) << name;
  }
  EXPECT_EQ(code("mailbox-"), absl::StatusCode::kNotFound);
  EXPECT_EQ(code("mailbox-41-2"), absl::StatusCode::kNotFound);
  EXPECT_NE(code("mailbox-" + std::string(5000, '1')), absl::StatusCode::kOk);
  EXPECT_EQ(code(kName), absl::StatusCode::kOk);
}

TEST_F(MailboxTest, WhatIsNoPlainFileIsRefused) {
  ASSERT_NE(Create(SmallShape()), nullptr);
  const auto open_other = [this](const std::string& name) {
    return Mailbox::Open(dir_, name, SmallShape().geometry, kGeneration).status();
  };
  std::filesystem::create_symlink(Path(kName), Path("mailbox-link"));
  EXPECT_FALSE(open_other("mailbox-link").ok()) << "it could lead out of the folder";
  std::filesystem::create_directory(Path("mailbox-folder"));
  EXPECT_FALSE(open_other("mailbox-folder").ok());
  ASSERT_EQ(mkfifo(Path("mailbox-pipe").c_str(), 0600), 0);
  EXPECT_FALSE(open_other("mailbox-pipe").ok());
}

TEST_F(MailboxTest, AFileOfAnotherSizeIsRefused) {
  HeaderBytes header = HeaderOf(SmallShape());
  const int64_t bytes = SmallShape().file_bytes();
  for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{128}, int64_t{4095},
                             int64_t{4096}, int64_t{4097}, int64_t{4608}, bytes / 2, bytes - 4096,
                             bytes - 1, bytes + 1, bytes + 4096, 2 * bytes}) {
    WriteFile(header, bytes);
    ASSERT_EQ(truncate(Path(kName).c_str(), size), 0);
    EXPECT_EQ(CodeOfOpen(), kDataLoss) << size;
  }
  WriteFile(header, bytes);
  EXPECT_EQ(CodeOfOpen(), absl::StatusCode::kOk);
}

TEST_F(MailboxTest, AnotherGenerationOrGeometryIsRefusedWithBoth) {
  ASSERT_NE(Create(SmallShape()), nullptr);
  const absl::Status status = Open(SmallShape().geometry, 42).status();
  EXPECT_EQ(status.code(), kFailedPrecondition);
  EXPECT_NE(status.message().find("generation 41"), std::string::npos) << status;
  EXPECT_NE(status.message().find("generation 42"), std::string::npos) << status;
  for (const KvGeometry& geometry : {KvGeometry{3, 2, 64}, KvGeometry{2, 3, 64},
                                     KvGeometry{2, 2, 128}, KvGeometry{0, 0, 0}}) {
    EXPECT_EQ(Open(geometry).status().code(), kFailedPrecondition);
  }
  EXPECT_TRUE(Open().ok());
}

TEST_F(MailboxTest, EveryDamagedBitOfTheFixedHeaderIsNoticed) {
  HeaderBytes header = HeaderOf(SmallShape());
  constexpr size_t kEnd = offsetof(MailboxHeader, checksum) + sizeof(uint64_t);
  for (size_t bit = 0; bit < 8 * kEnd; ++bit) {
    header.bytes()[bit / 8] ^= 1 << bit % 8;
    WriteFile(header, SmallShape().file_bytes());
    EXPECT_FALSE(Open().ok()) << "bit " << bit;
    header.bytes()[bit / 8] ^= 1 << bit % 8;
  }
  header->checksum ^= 1;
  WriteFile(header, SmallShape().file_bytes());
  EXPECT_EQ(CodeOfOpen(), kDataLoss);
}

TEST_F(MailboxTest, ForgedFieldsAreRefusedOneByOne) {
  EXPECT_EQ(CodeOfForged([](MailboxHeader&) {}), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOfForged([](MailboxHeader& h) { h.incarnation = 0; }), absl::StatusCode::kOk);
  const std::vector<std::pair<absl::StatusCode, std::function<void(MailboxHeader&)>>> forgeries = {
      {kFailedPrecondition, [](MailboxHeader& h) { h.magic[7] = 'Y'; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.format_version = 0; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.format_version = 1; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.header_bytes = 0; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.header_bytes = 8192; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.query_encoding = 0; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.query_encoding = 2; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.generation = 0; }},
      {kFailedPrecondition, [](MailboxHeader& h) { ++h.generation; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.num_layers = 1; }},
      {kFailedPrecondition, [](MailboxHeader& h) { h.num_kv_heads = 3; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_layers = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_layers = -1; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_layers = 200; }},  // their places leave the table
      {kDataLoss, [](MailboxHeader& h) { h.num_layers = INT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_layers = INT32_MIN; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = -6; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = 5; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = 8; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = INT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_q_heads = INT32_MIN; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_kv_heads = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_kv_heads = -1; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_kv_heads = 4; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_kv_heads = INT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.head_dim = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.head_dim = -64; }},
      {kDataLoss, [](MailboxHeader& h) { h.head_dim = 128; }},
      {kDataLoss, [](MailboxHeader& h) { h.head_dim = INT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_slots = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_slots = 1; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_slots = 3; }},
      {kDataLoss, [](MailboxHeader& h) { h.num_slots = UINT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.tables_per_slot = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.tables_per_slot = 40; }},
      {kDataLoss, [](MailboxHeader& h) { h.tables_per_slot = UINT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.max_rows = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.max_rows = 300; }},
      {kDataLoss, [](MailboxHeader& h) { h.max_rows = UINT32_MAX; }},
      {kDataLoss, [](MailboxHeader& h) { h.table_bytes = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.table_bytes = 1025; }},
      {kDataLoss, [](MailboxHeader& h) { h.table_bytes = 1 << 20; }},
      {kDataLoss, [](MailboxHeader& h) { h.table_bytes = uint64_t{1} << 63; }},
      {kDataLoss, [](MailboxHeader& h) { h.table_bytes = UINT64_MAX - 63; }},
      {kDataLoss, [](MailboxHeader& h) { h.slot_bytes = 0; }},
      {kDataLoss, [](MailboxHeader& h) { h.slot_bytes -= 4096; }},
      {kDataLoss, [](MailboxHeader& h) { h.slot_bytes += 4096; }},
      {kDataLoss, [](MailboxHeader& h) { h.slot_bytes += uint64_t{1} << 63; }},
      {kDataLoss, [](MailboxHeader& h) { h.slot_bytes = UINT64_MAX; }},
  };
  for (size_t i = 0; i < forgeries.size(); ++i) {
    EXPECT_EQ(CodeOfForged(forgeries[i].second), forgeries[i].first) << "forgery " << i;
  }
}

// Files whose numbers fit together, and are beyond what a mailbox may have.
TEST_F(MailboxTest, ShapesBeyondTheBoundsAreRefusedOneByOne) {
  EXPECT_EQ(CodeOfShape([](MailboxShape&) {}), absl::StatusCode::kOk);
  const std::vector<std::function<void(MailboxShape&)>> wrong = {
      [](MailboxShape& s) { s.num_slots = 0; },
      [](MailboxShape& s) { s.num_slots = 65; },
      [](MailboxShape& s) { s.tables_per_slot = 0; },
      [](MailboxShape& s) { s.tables_per_slot = 65; },
      [](MailboxShape& s) { s.max_rows = 0; },
      [](MailboxShape& s) { s.max_rows = 65537; },
      [](MailboxShape& s) { s.num_q_heads = 0; },
      [](MailboxShape& s) { s.num_q_heads = 5; },    // no whole group
      [](MailboxShape& s) { s.num_q_heads = 130; },  // 65 query heads share a KV head
      [](MailboxShape& s) { s.geometry = {2, 2048, 1}, s.num_q_heads = 33 * 2048; },
      [](MailboxShape& s) { s.geometry.num_layers = 0; },
      [](MailboxShape& s) { s.geometry.num_layers = 121; },  // a table takes 120
      [](MailboxShape& s) { s.geometry.num_layers = 4097, s.table_bytes = 1 << 20; },
      [](MailboxShape& s) { s.geometry.head_dim = 0; },
      [](MailboxShape& s) { s.geometry.head_dim = 1 << 20; },
      [](MailboxShape& s) { s.table_bytes = 0; },
      [](MailboxShape& s) { s.table_bytes = 64; },
      [](MailboxShape& s) { s.table_bytes = 1024 + 8; },
      [](MailboxShape& s) { s.table_bytes = (int64_t{1} << 32) + 64; },
  };
  for (size_t i = 0; i < wrong.size(); ++i) {
    EXPECT_EQ(CodeOfShape(wrong[i]), kDataLoss) << "shape " << i;
  }
  EXPECT_EQ(CodeOfShape([](MailboxShape& s) { s.geometry.num_layers = 120; }),
            absl::StatusCode::kOk);
  EXPECT_EQ(CodeOfShape([](MailboxShape& s) { s.num_q_heads = 128; }), absl::StatusCode::kOk);
}

// Counts whose products overflow 64 bits, also to what the file has.
TEST_F(MailboxTest, CountsThatOverflowAreRefused) {
  EXPECT_EQ(CodeOfForged([](MailboxHeader& h) {
              h.num_q_heads = INT32_MAX;
              h.num_kv_heads = h.head_dim = INT32_MAX;
              h.num_slots = h.tables_per_slot = h.max_rows = UINT32_MAX;
              h.table_bytes = h.slot_bytes = static_cast<uint64_t>(INT64_MAX);
            }),
            kDataLoss);
  // 2^31 tables of 2^33 bytes: 2^64, and so 0.
  EXPECT_EQ(CodeOfForged([](MailboxHeader& h) {
              h.tables_per_slot = uint32_t{1} << 31;
              h.table_bytes = uint64_t{1} << 33;
            }),
            kDataLoss);
  EXPECT_EQ(CodeOfForged([](MailboxHeader& h) {
              h.num_slots = uint32_t{1} << 31;
              h.slot_bytes = uint64_t{1} << 33;
            }),
            kDataLoss);
  EXPECT_EQ(CodeOfForged([](MailboxHeader& h) {
              h.num_slots = 0;
              h.slot_bytes = UINT64_MAX;
            }),
            kDataLoss);
}

TEST_F(MailboxTest, RandomBytesAreNoMailbox) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 200; ++round) {
    HeaderBytes header = HeaderOf(SmallShape());
    // In turn: anything; anything after the format; that with a checksum that agrees.
    const size_t begin = round % 3 == 0 ? 0 : offsetof(MailboxHeader, generation);
    for (size_t i = begin; i < 256; ++i) header.bytes()[i] = static_cast<uint8_t>(random());
    header->query_encoding = 1;
    if (round % 3 == 2) header.Seal();
    WriteFile(header, SmallShape().file_bytes());
    EXPECT_FALSE(Open().ok());
  }
}

// What the file says after it was checked is not asked again.
TEST_F(MailboxTest, AHeaderThatChangesLaterChangesNothing) {
  const std::unique_ptr<Mailbox> made = Create(SmallShape());
  ASSERT_NE(made, nullptr);
  const auto opened = Open();
  ASSERT_TRUE(opened.ok());
  made->header().num_slots = UINT32_MAX;
  made->header().slot_bytes = UINT64_MAX;
  made->header().table_bytes = 0;
  EXPECT_EQ((*opened)->shape().num_slots, 2u);
  EXPECT_EQ((*opened)->shape().table_bytes, 1024);
  EXPECT_EQ(reinterpret_cast<uint8_t*>(&(*opened)->slot(1)) - (*opened)->data(),
            reinterpret_cast<uint8_t*>(&made->slot(1)) - made->data());
}

// ---------------------------------------------------------------- the doorbells

// Two mappings, as two processes have them.
class MailboxBells : public MailboxTest {
 protected:
  MailboxBells() : worker_(Create(SmallShape())), store_(Open().value()) {}
  const std::unique_ptr<Mailbox> worker_;
  const std::unique_ptr<Mailbox> store_;
};

TEST_F(MailboxBells, AnAnswerThatIsThereIsNotWaitedFor) {
  RingAnswered(store_->slot(1), 3);
  for (const uint64_t count : {0, 1, 3}) {
    EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(1), count, absl::ZeroDuration()));
  }
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(1), 4, absl::ZeroDuration()));
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::ZeroDuration()));
}

TEST_F(MailboxBells, AWaitEndsAtItsTimeoutOrWhenTheMailboxIsRetired) {
  const absl::Time begin = absl::Now();
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Milliseconds(30)));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(30));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  std::thread other([this] {
    absl::SleepFor(absl::Milliseconds(20));
    store_->header().retired.store(1);
  });
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Minutes(10)));
  other.join();
}

TEST_F(MailboxBells, AWaitThatSleepsIsWokenThroughTheOtherMapping) {
  for (uint64_t count = 1; count <= 15; ++count) {
    std::thread waiter([&] {
      const absl::Time begin = absl::Now();
      EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(0), count, absl::Minutes(1),
                                absl::Minutes(1)));
      EXPECT_LT(absl::Now() - begin, absl::Minutes(1)) << "nobody woke it";
    });
    while (store_->slot(0).worker_sleeps.load() == 0) std::this_thread::yield();
    absl::SleepFor(absl::Milliseconds(1));
    RingAnswered(store_->slot(0), count);
    waiter.join();
  }
}

// The low half of the count is what is slept on: one that passes 2^32 ends the wait all the same.
TEST_F(MailboxBells, CountsMayPassTheWordThatIsSleptOn) {
  const uint64_t before = uint64_t{1} << 32;
  store_->slot(0).answered.store(before - 1);
  std::thread store([&] {
    absl::SleepFor(absl::Milliseconds(10));
    RingAnswered(store_->slot(0), before);
  });
  EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(0), before, absl::Minutes(1)));
  store.join();
}

// A store that looks at `wake` before it says that it sleeps misses no rise of it.
TEST_F(MailboxBells, EveryPostAndEveryBeginOfAStepRaisesTheWordThatAStoreSleepsOn) {
  RingPosted(worker_->header(), worker_->slot(1), 1);
  EXPECT_EQ(store_->slot(1).posted, 1u);
  EXPECT_EQ(store_->slot(0).posted, 0u);
  EXPECT_EQ(store_->header().wake, 1u);
  WakeStore(worker_->header());
  EXPECT_EQ(store_->header().wake, 2u);
  store_->header().store_sleeps.store(1);
  RingPosted(worker_->header(), worker_->slot(1), 2);
  EXPECT_EQ(store_->header().wake, 3u);
  WakeStore(worker_->header());
  EXPECT_EQ(store_->header().wake, 4u);
}

// A bell may be late: what it tells has been seen, served and answered, and who sleeps again by then
// waits for the next one. It must find the flag as it was set.
TEST_F(MailboxBells, ALateBellDoesNotTakeTheNextOnes) {
  store_->header().store_sleeps.store(1);
  WakeStore(worker_->header());
  RingPosted(worker_->header(), worker_->slot(0), 1);
  EXPECT_EQ(store_->header().store_sleeps, 1u);
  worker_->slot(0).worker_sleeps.store(1);
  RingAnswered(store_->slot(0), 1);
  EXPECT_EQ(worker_->slot(0).worker_sleeps, 1u);
}

// Who no longer waits costs nobody a call to the kernel.
TEST_F(MailboxBells, AWaitThatIsOverSleepsNoMore) {
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Milliseconds(30)));
  EXPECT_EQ(worker_->slot(0).worker_sleeps, 0u);
}

// Each side asks and answers by turns; what either sleeps through is lost time, never a post.
TEST_F(MailboxBells, NoPostAndNoAnswerIsMissed) {
  constexpr uint64_t kPosts = 3000;
  std::thread store([this] {
    for (uint64_t count = 1; count <= kPosts; ++count) {
      MailboxHeader& header = store_->header();
      while (store_->slot(0).posted.load() < count) {
        const uint32_t wake = header.wake.load();
        header.store_sleeps.store(1);
        if (store_->slot(0).posted.load() < count) {
          SharedFutexWait(header.wake, wake, absl::Seconds(10));
        }
        header.store_sleeps.store(0);
      }
      RingAnswered(store_->slot(0), count);
    }
  });
  const absl::Time begin = absl::Now();
  for (uint64_t count = 1; count <= kPosts; ++count) {
    RingPosted(worker_->header(), worker_->slot(0), count);
    if (AwaitAnswered(worker_->header(), worker_->slot(0), count, absl::Minutes(1))) continue;
    ADD_FAILURE() << "post " << count << " was not answered";
    RingPosted(worker_->header(), worker_->slot(0), kPosts);  // so that the other thread ends
    break;
  }
  store.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10)) << "a bell was not heard";
}

}  // namespace
}  // namespace headroom
