#include "common/segment/mapped_segment.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <random>
#include <string>

#include "tests/common/handmade_segment.h"

namespace headroom {
namespace {

constexpr int64_t kDataBytes = 1 << 20;
constexpr uint64_t kSegmentGeneration = 41;

class MappedSegmentTest : public testing::Test {
 protected:
  absl::Status Open() { return MappedSegment::Open(dir_, expected_, kSegmentGeneration).status(); }
  // Open() after a change to the header that its checksum agrees with.
  template <typename Change>
  absl::Status OpenForged(Change change) {
    const IndexHeader saved = header_;
    change(header_);
    header_.checksum = ChecksumOf(header_);
    WriteIndex();
    const absl::Status status = Open();
    header_ = saved;
    WriteIndex();
    return status;
  }

  void WriteIndex() { files_.WriteIndex(); }

  HandmadeSegment files_{kDataBytes, /*ready_bytes=*/kDataBytes / 2, kSegmentGeneration};
  const std::string& dir_ = files_.dir();
  IndexHeader& header_ = files_.header;
  SegmentBinding expected_ = HandmadeSegment::Binding();
};

TEST_F(MappedSegmentTest, WhatIsWrittenIsInTheFile) {
  const auto segment = MappedSegment::Open(dir_, expected_, kSegmentGeneration);
  ASSERT_TRUE(segment.ok()) << segment.status();
  EXPECT_EQ((*segment)->data_bytes(), kDataBytes);
  EXPECT_EQ((*segment)->generation(), kSegmentGeneration);
  std::memcpy((*segment)->data() + 5000, "keys", 4);
  const int fd = open((dir_ + "/data").c_str(), O_RDONLY);
  char read_back[4];
  ASSERT_EQ(pread(fd, read_back, 4, 5000), 4);
  EXPECT_EQ(std::memcmp(read_back, "keys", 4), 0);
  close(fd);
}

TEST_F(MappedSegmentTest, SeesWhatTheStoreWritesLater) {
  const auto segment = MappedSegment::Open(dir_, expected_, kSegmentGeneration);
  ASSERT_TRUE(segment.ok());
  EXPECT_EQ((*segment)->ready_bytes(), kDataBytes / 2);
  header_.ready_bytes = kDataBytes;
  header_.generation = kSegmentGeneration + 1;
  WriteIndex();
  EXPECT_EQ((*segment)->ready_bytes(), kDataBytes);
  EXPECT_EQ((*segment)->current_generation(), kSegmentGeneration + 1);
  EXPECT_EQ((*segment)->generation(), kSegmentGeneration);
  header_.ready_bytes = UINT64_MAX;
  WriteIndex();
  EXPECT_EQ((*segment)->ready_bytes(), kDataBytes) << "never more than is mapped";
}

TEST_F(MappedSegmentTest, AnotherModelIsRefusedWithBothNames) {
  expected_.fingerprint.fill(8);
  const absl::Status status = Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_NE(status.message().find("09090909"), std::string::npos) << status;
  EXPECT_NE(status.message().find("08080808"), std::string::npos) << status;
}

TEST_F(MappedSegmentTest, AnotherGeometryOrShardIsRefused) {
  expected_.geometry.num_kv_heads = 4;
  EXPECT_TRUE(absl::IsFailedPrecondition(Open()));
  expected_.geometry.num_kv_heads = 3;
  expected_.first_layer = 2;
  EXPECT_TRUE(absl::IsFailedPrecondition(Open()));
}

TEST_F(MappedSegmentTest, AnotherGenerationIsRefused) {
  for (const uint64_t other : {kSegmentGeneration - 1, kSegmentGeneration + 1}) {
    EXPECT_TRUE(
        absl::IsFailedPrecondition(MappedSegment::Open(dir_, expected_, other).status()));
  }
}

TEST_F(MappedSegmentTest, WithoutFilesThereIsNothingToMap) {
  std::filesystem::remove(dir_ + "/data");
  EXPECT_TRUE(absl::IsNotFound(Open()));
  EXPECT_TRUE(absl::IsNotFound(
      MappedSegment::Open(dir_ + "/none", expected_, kSegmentGeneration).status()));
}

TEST_F(MappedSegmentTest, ADataFileThatIsShorterIsNotMapped) {
  ASSERT_EQ(truncate((dir_ + "/data").c_str(), kDataBytes - 4096), 0);
  EXPECT_TRUE(absl::IsDataLoss(Open())) << "touching the end would be SIGBUS";
}

TEST_F(MappedSegmentTest, AnotherDataFileIsNotMapped) {
  std::filesystem::rename(dir_ + "/data", dir_ + "/old");
  std::filesystem::copy_file(dir_ + "/old", dir_ + "/data");
  EXPECT_TRUE(absl::IsDataLoss(Open()));
}

TEST_F(MappedSegmentTest, EveryDamagedBitOfTheFixedHeaderIsNoticed) {
  for (size_t bit = 0; bit < 8 * offsetof(IndexHeader, generation); ++bit) {
    auto* const bytes = reinterpret_cast<uint8_t*>(&header_);
    bytes[bit / 8] ^= 1 << bit % 8;
    WriteIndex();
    EXPECT_FALSE(Open().ok()) << "bit " << bit;
    bytes[bit / 8] ^= 1 << bit % 8;
  }
  WriteIndex();
  EXPECT_TRUE(Open().ok());
}

TEST_F(MappedSegmentTest, ForgedNumbersAreRefusedOneByOne) {
  EXPECT_TRUE(OpenForged([](IndexHeader&) {}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      OpenForged([](IndexHeader& h) { h.format_version = kSegmentFormatVersion + 1; })));
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenForged([](IndexHeader& h) { h.encoding = 0; })));
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenForged([](IndexHeader& h) { h.encoding = 2; })));
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenForged([](IndexHeader& h) { h.header_bytes = 64; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.max_extents = 0; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.max_extents = UINT32_MAX; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.data_bytes = 0; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.data_bytes = UINT64_MAX; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.data_bytes += 4096; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.num_layers = -1; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.num_kv_heads = INT32_MAX; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.head_dim = 0; })));
  EXPECT_TRUE(absl::IsDataLoss(OpenForged([](IndexHeader& h) { h.first_layer = -1; })));
}

TEST_F(MappedSegmentTest, AnIndexThatIsTooShortIsRefused) {
  for (const int bytes : {4096, 4095, 100, 0}) {
    ASSERT_EQ(truncate((dir_ + "/index").c_str(), bytes), 0);
    EXPECT_TRUE(absl::IsDataLoss(Open())) << bytes;
  }
}

TEST_F(MappedSegmentTest, RandomBytesAreNoIndex) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 200; ++round) {
    for (uint8_t& byte : header_.reserved_tail) byte = static_cast<uint8_t>(random());
    auto* const bytes = reinterpret_cast<uint8_t*>(&header_);
    for (int i = 0; i < 144; ++i) bytes[i] = static_cast<uint8_t>(random());
    WriteIndex();
    EXPECT_FALSE(Open().ok());
  }
}

TEST(SegmentFormat, SealedWordsSayWhenTheyAreDamaged) {
  for (const int64_t tokens : {int64_t{0}, int64_t{64}, int64_t{1} << 30}) {
    const uint64_t word = SealedWord(tokens);
    EXPECT_EQ(SealedTokens(word), tokens);
    for (int bit = 0; bit < 64; ++bit) {
      EXPECT_FALSE(SealedTokens(word ^ uint64_t{1} << bit).has_value());
    }
  }
}

TEST(SegmentFormat, ADescriptorInUseIsNeverMistakenForAFreeOne) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 1000; ++round) {
    ExtentDescriptor descriptor = {};
    descriptor.sequence_id = random();
    descriptor.data_offset = random();
    EXPECT_NE(CommitWordOf(descriptor), 0u);
  }
}

TEST(SegmentFormat, GeometriesThatCannotBeLaidOutAreNotUsable) {
  EXPECT_TRUE(IsUsable({30, 3, 64}));
  EXPECT_TRUE(IsUsable({32, 8, 128}));
  EXPECT_TRUE(IsUsable({1, 1, 1}));
  for (const KvGeometry& geometry :
       {KvGeometry{0, 3, 64}, KvGeometry{30, 0, 64}, KvGeometry{30, 3, 0}, KvGeometry{-1, 3, 64},
        KvGeometry{INT32_MAX, 3, 64}, KvGeometry{30, INT32_MAX, 64}, KvGeometry{30, 3, INT32_MAX},
        KvGeometry{30, 1024, 256}}) {
    EXPECT_FALSE(IsUsable(geometry));
  }
}

TEST(SegmentFormat, MailboxesAreNamedByGenerationAndSerial) {
  EXPECT_EQ(MailboxFile(17, 2), "mailbox-17-2");
}

}  // namespace
}  // namespace headroom
