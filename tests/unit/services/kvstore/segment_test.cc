#include "services/kvstore/segment.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "services/kvstore/extent_index.h"
#include "tests/common/tmpfs_mount.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

constexpr std::atomic<bool> kGoOn{false};

mode_t ModeOf(const std::string& path) {
  struct stat stat = {};
  EXPECT_EQ(lstat(path.c_str(), &stat), 0) << path;
  return stat.st_mode & 07777;
}
ino_t InodeOf(const std::string& path) {
  struct stat stat = {};
  return lstat(path.c_str(), &stat) == 0 ? stat.st_ino : 0;
}

TEST(Segment, MakesFilesThatOnlyItsUserCanRead) {
  const TempSegmentDir parent;
  SegmentOptions options = SmallSegment(parent);
  options.dir = parent.File("segment");
  const std::unique_ptr<Segment> segment = Must(Segment::Open(options));
  EXPECT_EQ(ModeOf(options.dir), 0700u);
  EXPECT_EQ(ModeOf(options.dir + "/index"), 0600u);
  EXPECT_EQ(ModeOf(options.dir + "/data"), 0600u);
  EXPECT_FALSE(segment->why_new().empty());
  EXPECT_FALSE(segment->binding().has_value());
  EXPECT_EQ(segment->descriptors().size(), 256u);
}

TEST(Segment, TakesOverWhatAnEarlierStoreHasLeft) {
  const TempSegmentDir dir;
  uint64_t generation = 0;
  {
    const std::unique_ptr<Segment> segment = Must(Segment::Open(SmallSegment(dir)));
    ASSERT_TRUE(segment->Prefault(4 << 20, kGoOn).ok());
    segment->Bind(BindingOf(kSmallGeometry, 7));
    generation = segment->generation();
  }
  const std::unique_ptr<Segment> segment = Must(Segment::Open(SmallSegment(dir)));
  EXPECT_EQ(segment->why_new(), "");
  EXPECT_GT(segment->generation(), generation);
  EXPECT_EQ(segment->ready_bytes(), 4 << 20);
  EXPECT_EQ(segment->binding(), BindingOf(kSmallGeometry, 7));
}

TEST(Segment, ASecondStoreOnTheFolderIsRefusedAtOnce) {
  const TempSegmentDir dir;
  std::unique_ptr<Segment> first = Must(Segment::Open(SmallSegment(dir)));
  const absl::Status status = Segment::Open(SmallSegment(dir)).status();
  EXPECT_TRUE(absl::IsAlreadyExists(status)) << status;
  EXPECT_EQ(ReasonOf(status), "SEGMENT_IN_USE");
  EXPECT_NE(status.message().find(dir.path()), std::string::npos) << status;
  EXPECT_NE(status.message().find("lock"), std::string::npos) << status;
  first.reset();
  EXPECT_TRUE(Segment::Open(SmallSegment(dir)).ok());
}

TEST(Segment, TheLockOfAProcessThatWasKilledIsFree) {
  const TempSegmentDir dir;
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  const pid_t child = fork();
  if (child == 0) {
    const auto segment = Segment::Open(SmallSegment(dir));
    [[maybe_unused]] const ssize_t said = write(pipe_fds[1], "x", 1);
    for (;;) pause();
  }
  char said;
  ASSERT_EQ(read(pipe_fds[0], &said, 1), 1);
  EXPECT_TRUE(absl::IsAlreadyExists(Segment::Open(SmallSegment(dir)).status()));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(Segment::Open(SmallSegment(dir)).ok());
  close(pipe_fds[0]);
  close(pipe_fds[1]);
}

TEST(Segment, FilesThatDoNotFitAreReplacedAndNeverTruncated) {
  const TempSegmentDir dir;
  Must(Segment::Open(SmallSegment(dir, 8 << 20)));
  const int old_data = open(dir.File("data").c_str(), O_RDONLY);
  const std::unique_ptr<Segment> segment = Must(Segment::Open(SmallSegment(dir, 4 << 20)));
  EXPECT_NE(segment->why_new(), "");
  struct stat stat = {};
  ASSERT_EQ(fstat(old_data, &stat), 0);
  EXPECT_EQ(stat.st_size, 8 << 20) << "whoever has it mapped must not get SIGBUS";
  EXPECT_NE(stat.st_ino, InodeOf(dir.File("data")));
  close(old_data);
}

TEST(Segment, AnIndexBesideAnotherDataFileIsNotTrusted) {
  const TempSegmentDir dir;
  Must(Segment::Open(SmallSegment(dir)));
  ASSERT_EQ(rename(dir.File("data").c_str(), dir.File("old").c_str()), 0);
  std::filesystem::copy_file(dir.File("old"), dir.File("data"));
  EXPECT_NE(Must(Segment::Open(SmallSegment(dir)))->why_new(), "");
}

TEST(Segment, MemoryThatIsClaimedButNotThereIsNotTrusted) {
  const TempSegmentDir dir;
  Must(Segment::Open(SmallSegment(dir)));
  const int fd = open(dir.File("index").c_str(), O_RDWR);
  const uint64_t claimed = 8 << 20;
  ASSERT_EQ(pwrite(fd, &claimed, sizeof(claimed), offsetof(IndexHeader, ready_bytes)), 8);
  close(fd);
  EXPECT_NE(Must(Segment::Open(SmallSegment(dir)))->why_new(), "");
}

TEST(Segment, FollowsNoSymbolicLinks) {
  const TempSegmentDir dir, elsewhere;
  std::ofstream(elsewhere.File("victim")) << "precious";
  ASSERT_EQ(symlink(elsewhere.File("victim").c_str(), dir.File("data").c_str()), 0);
  EXPECT_TRUE(Segment::Open(SmallSegment(dir)).ok());
  std::string text;
  std::ifstream(elsewhere.File("victim")) >> text;
  EXPECT_EQ(text, "precious");
}

TEST(Segment, PrefaultingBacksBytesWithMemory) {
  const TempSegmentDir dir;
  const std::unique_ptr<Segment> segment = Must(Segment::Open(SmallSegment(dir, 8 << 20)));
  struct stat stat = {};
  ASSERT_EQ(lstat(dir.File("data").c_str(), &stat), 0);
  EXPECT_EQ(stat.st_blocks, 0);
  ASSERT_TRUE(segment->Prefault(INT64_MAX, kGoOn).ok());
  ASSERT_EQ(lstat(dir.File("data").c_str(), &stat), 0);
  EXPECT_EQ(stat.st_blocks * 512, 8 << 20);
  EXPECT_EQ(segment->ready_bytes(), 8 << 20);
  EXPECT_GE(segment->CountHugePageBytes(), 0);
}

TEST(Segment, ATmpfsThatIsTooSmallIsRefusedByName) {
  const TempSegmentDir dir;
  const absl::Status status = Segment::Open(SmallSegment(dir, int64_t{1} << 45)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find("--host-memory"), std::string::npos) << status;
  EXPECT_NE(status.message().find("--segment-dir"), std::string::npos) << status;
  EXPECT_EQ(InodeOf(dir.File("data")), 0u) << "nothing was made";
}

// Whether these words are all in the error.
testing::AssertionResult Names(const absl::Status& status, const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    if (status.message().find(word) == std::string::npos) {
      return testing::AssertionFailure() << word << " is not in " << status;
    }
  }
  return testing::AssertionSuccess();
}

TEST(SmallTmpfs, OneThatIsSmallerThanTheSegmentIsRefusedByName) {
  const TempSegmentDir dir;
  const TmpfsMount tmpfs(dir.path(), "size=4m");
  if (!tmpfs.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
  const absl::Status status = Segment::Open(SmallSegment(dir, 8 << 20)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(Names(status, {"--host-memory", "--segment-dir", dir.path()}));
  EXPECT_EQ(InodeOf(dir.File("data")), 0u) << "nothing was made";
}

// Others may take the memory that was free when the segment was made.
TEST(SmallTmpfs, OneThatHasBecomeFullIsAnErrorAndNoSigbus) {
  const TempSegmentDir dir;
  const TmpfsMount tmpfs(dir.path(), "size=16m");
  if (!tmpfs.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
  SegmentOptions options = SmallSegment(dir, 8 << 20);
  options.dir = dir.File("segment");
  const std::unique_ptr<Segment> segment = Must(Segment::Open(options));
  ASSERT_TRUE(segment->Prefault(1 << 20, kGoOn).ok());
  {
    std::ofstream other(dir.File("other"), std::ios::binary);
    const std::string piece(1 << 20, 'x');
    while (other.write(piece.data(), static_cast<std::streamsize>(piece.size())).flush()) {
    }
  }
  const absl::Status status = segment->Prefault(8 << 20, kGoOn);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(Names(status, {"--host-memory", "--segment-dir"}));
  EXPECT_EQ(segment->ready_bytes(), 1 << 20) << "no more than what is there";
  // And a store that comes now does not begin.
  options.dir = dir.File("second");
  const absl::Status second = Segment::Open(options).status();
  EXPECT_TRUE(absl::IsResourceExhausted(second)) << second;
  EXPECT_TRUE(Names(second, {"--host-memory", "--segment-dir"}));
}

TEST(SmallTmpfs, OneThatCannotBeWrittenIsRefusedByName) {
  const TempSegmentDir dir;
  const TmpfsMount tmpfs(dir.path(), "size=16m", MS_RDONLY);
  if (!tmpfs.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
  SegmentOptions options = SmallSegment(dir, 8 << 20);
  for (const std::string& folder : {dir.path(), dir.File("segment")}) {
    options.dir = folder;
    const absl::Status status = Segment::Open(options).status();
    EXPECT_FALSE(status.ok());
    EXPECT_TRUE(Names(status, {absl::StrCat("--segment-dir ", folder), "Read-only"}));
  }
}

TEST(Segment, NumbersOutOfRangeAreRefusedByName) {
  const TempSegmentDir dir;
  for (const int64_t bytes : {INT64_MIN, int64_t{-1}, int64_t{0}, int64_t{1}, INT64_MAX}) {
    const absl::Status status = Segment::Open(SmallSegment(dir, bytes)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find("--host-memory"), std::string::npos) << status;
  }
  for (const int64_t extents : {INT64_MIN, int64_t{-1}, int64_t{0}, INT64_MAX}) {
    const absl::Status status = Segment::Open(SmallSegment(dir, 8 << 20, extents)).status();
    EXPECT_NE(status.message().find("--max-extents"), std::string::npos) << status;
  }
  SegmentOptions options = SmallSegment(dir);
  options.dir = "";
  EXPECT_TRUE(absl::IsInvalidArgument(Segment::Open(options).status()));
  options.dir = dir.File("no/such/parent");
  EXPECT_TRUE(absl::IsNotFound(Segment::Open(options).status()));
}

// ---------------------------------------------------------------- hostile files

// A segment with sequences whose index file is changed under it.
class HostileIndex : public testing::Test {
 protected:
  static constexpr int64_t kDataBytes = 4 << 20;

  void MakeGolden() {
    const std::unique_ptr<Segment> segment = Must(Segment::Open(SmallSegment(dir_, kDataBytes, 100)));
    ASSERT_TRUE(segment->Prefault(kDataBytes, kGoOn).ok());
    segment->Bind(BindingOf(kSmallGeometry, 7));
    ExtentIndex index(segment->descriptors(), kSmallGeometry);
    index.AddRange(0, kDataBytes);
    index.Recover();
    for (uint64_t id = 1; id <= 10; ++id) {
      Must(index.AllocateRun(id, 0, 64));
      Must(index.AllocateRun(id, 64, id % 2 == 0 ? 64 : 128));
      const SealedCount sealed = {id, 128};
      ASSERT_TRUE(index.CommitSealed({&sealed, 1}).ok());
    }
    std::ifstream file(dir_.File("index"), std::ios::binary);
    golden_.assign(std::istreambuf_iterator<char>(file), {});
  }

  // The golden index with `mutate` applied, as the folder's.
  template <typename Mutate>
  void Plant(Mutate mutate) {
    std::vector<char> bytes = golden_;
    mutate(reinterpret_cast<IndexHeader&>(*bytes.data()),
           std::span(reinterpret_cast<ExtentDescriptor*>(bytes.data() + sizeof(IndexHeader)), 100));
    const int fd = open(dir_.File("index").c_str(), O_WRONLY);
    ASSERT_EQ(pwrite(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    close(fd);
  }

  // Opens what was planted as a store does. If new files were made instead, golden is made again.
  void OpenAndCheck() {
    bool replaced = false;
    {
      absl::StatusOr<std::unique_ptr<Segment>> opened =
          Segment::Open(SmallSegment(dir_, kDataBytes, 100));
      ASSERT_TRUE(opened.ok()) << opened.status();
      Segment& segment = **opened;
      replaced = !segment.why_new().empty();
      if (segment.binding().has_value()) {
        ASSERT_TRUE(IsUsable(segment.binding()->geometry));
        ExtentIndex index(segment.descriptors(), segment.binding()->geometry);
        index.AddRange(0, segment.ready_bytes());
        index.Recover();
        ASSERT_EQ(index.CheckInvariants(), "");
        kept_ = index.sequences();
        // It goes on working: everything can be released, and taken again.
        while (!index.sequences().empty()) index.Release(index.sequences().begin()->first);
        ASSERT_EQ(index.used_bytes(), 0);
        ASSERT_EQ(index.CheckInvariants(), "");
      }
    }
    if (!replaced) return;
    std::filesystem::remove(dir_.File("index"));
    MakeGolden();
  }

  const TempSegmentDir dir_;
  std::vector<char> golden_;
  std::map<uint64_t, StoredSequence> kept_;
};

TEST_F(HostileIndex, ThousandsOfMutationsCrashNothingAndServeNothingThatContradictsItself) {
  MakeGolden();
  std::mt19937_64 random(TestSeed());
  const auto interesting = [&]() -> uint64_t {
    const uint64_t values[] = {0,         1,          63,         64,         INT32_MAX, UINT32_MAX,
                               INT64_MAX, UINT64_MAX, 4096,       kDataBytes, 1 << 30,   random(),
                               uint64_t{1} << 63,     kDataBytes - 64};
    return values[random() % std::size(values)];
  };
  // Most mutations are given right checksums, so that the checks behind those are reached.
  for (int round = 0; round < 2500; ++round) {
    SCOPED_TRACE(round);
    Plant([&](IndexHeader& header, std::span<ExtentDescriptor> descriptors) {
      const uint64_t inode = header.data_inode;
      for (uint64_t changes = random() % 4 + 1; changes > 0; --changes) {
        ExtentDescriptor& descriptor = descriptors[random() % 50];
        auto* const bytes = reinterpret_cast<uint8_t*>(&descriptor);
        auto* const header_bytes = reinterpret_cast<uint8_t*>(&header);
        const uint64_t value = interesting();
        switch (random() % 6) {
          case 0: bytes[random() % sizeof(descriptor)] ^= 1 << random() % 8; break;
          case 1: std::memcpy(bytes + random() % 8 * 8, &value, 8); break;
          case 2: std::memcpy(bytes + random() % 16 * 4, &value, 4); break;
          case 3: descriptor = descriptors[random() % 50]; break;
          case 4: header_bytes[random() % 144] ^= 1 << random() % 8; break;
          case 5: std::memcpy(header_bytes + 56 + random() % 6 * 4, &value, 4); break;
        }
        if (random() % 4 != 0 && descriptor.commit != 0) {
          descriptor.commit = CommitWordOf(descriptor);
        }
      }
      if (random() % 4 != 0) {
        header.magic = kIndexMagic;
        header.data_inode = inode;
        header.checksum = ChecksumOf(header);
      }
    });
    OpenAndCheck();
    if (HasFatalFailure()) return;
  }
}

TEST_F(HostileIndex, ADamagedDescriptorCostsOnlyItsOwnSequence) {
  MakeGolden();
  std::mt19937_64 random(TestSeed());
  for (int round = 0; round < 200; ++round) {
    uint64_t victim = 0;
    Plant([&](IndexHeader&, std::span<ExtentDescriptor> descriptors) {
      ExtentDescriptor& descriptor = descriptors[random() % 40];
      victim = descriptor.sequence_id;
      reinterpret_cast<uint8_t*>(&descriptor)[random() % 56] ^= 1 << random() % 8;
    });
    OpenAndCheck();
    for (uint64_t id = 1; id <= 10; ++id) {
      if (id == victim) continue;
      ASSERT_EQ(kept_.count(id), 1u) << "round " << round << ", sequence " << id;
      ASSERT_EQ(kept_[id].sealed_tokens, 128);
    }
    ASSERT_LT(kept_[victim].sealed_tokens, 128) << "round " << round;
  }
}

TEST_F(HostileIndex, AnotherFormatIsNotTakenOver) {
  MakeGolden();
  Plant([](IndexHeader& header, std::span<ExtentDescriptor>) {
    header.format_version = kSegmentFormatVersion + 1;
    header.checksum = ChecksumOf(header);
  });
  const std::unique_ptr<Segment> segment =
      Must(Segment::Open(SmallSegment(dir_, kDataBytes, 100)));
  EXPECT_NE(segment->why_new().find(absl::StrCat("format ", kSegmentFormatVersion + 1)),
            std::string::npos)
      << segment->why_new();
  EXPECT_FALSE(segment->binding().has_value());
}

TEST_F(HostileIndex, KeysOfBeforeTheMachineStartedAreNotTakenOver) {
  MakeGolden();
  Plant([](IndexHeader& header, std::span<ExtentDescriptor>) {
    header.boot_id[3] ^= 1;
    header.checksum = ChecksumOf(header);
  });
  EXPECT_NE(Must(Segment::Open(SmallSegment(dir_, kDataBytes, 100)))->why_new(), "");
}

TEST_F(HostileIndex, AnIndexThatIsTooShortIsNotTakenOver) {
  MakeGolden();
  ASSERT_EQ(truncate(dir_.File("index").c_str(), 5000), 0);
  EXPECT_NE(Must(Segment::Open(SmallSegment(dir_, kDataBytes, 100)))->why_new(), "");
}

TEST_F(HostileIndex, AGenerationFromNoClockIsNotCountedOn) {
  MakeGolden();
  Plant([](IndexHeader& header, std::span<ExtentDescriptor>) { header.generation = UINT64_MAX; });
  const uint64_t generation =
      Must(Segment::Open(SmallSegment(dir_, kDataBytes, 100)))->generation();
  EXPECT_GT(generation, 0u);
  EXPECT_LT(generation, uint64_t{1} << 53);
}

}  // namespace
}  // namespace headroom::kvstore
