// What is no mailbox, or not the one that is wanted, is refused when it is opened.
#include "common/segment/mailbox.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/segment_format.h"
#include "tests/unit/common/segment/mailbox_fixture.h"

namespace headroom {
namespace {

class MailboxRefusals : public MailboxTest {};

TEST_F(MailboxRefusals, NamesThatAreNoMailboxesAreRefused) {
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

TEST_F(MailboxRefusals, WhatIsNoPlainFileIsRefused) {
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

TEST_F(MailboxRefusals, AFileOfAnotherSizeIsRefused) {
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

TEST_F(MailboxRefusals, AnotherGenerationOrGeometryIsRefusedWithBoth) {
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

TEST_F(MailboxRefusals, EveryDamagedBitOfTheFixedHeaderIsNoticed) {
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

TEST_F(MailboxRefusals, ForgedFieldsAreRefusedOneByOne) {
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
TEST_F(MailboxRefusals, ShapesBeyondTheBoundsAreRefusedOneByOne) {
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
TEST_F(MailboxRefusals, CountsThatOverflowAreRefused) {
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

TEST_F(MailboxRefusals, RandomBytesAreNoMailbox) {
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
TEST_F(MailboxRefusals, AHeaderThatChangesLaterChangesNothing) {
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

}  // namespace
}  // namespace headroom
