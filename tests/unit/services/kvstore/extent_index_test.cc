#include "services/kvstore/extent_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

// An index over plain memory.
class ExtentIndexTest : public testing::Test {
 protected:
  static constexpr KvGeometry kGeometry = kThreeHeads;
  static constexpr int64_t kBytes = 24 << 20;
  static constexpr size_t kExtents = 90;

  ExtentIndexTest() : descriptors_(kExtents) { Restart(); }

  // As a new process would, over what the last one has left in the file.
  RecoveryReport Restart() {
    index_ = std::make_unique<ExtentIndex>(descriptors_, kGeometry);
    index_->AddRange(0, kBytes);
    return index_->Recover();
  }
  StoredRun Allocate(uint64_t id, int64_t first_pos, int64_t capacity) {
    return *Must(index_->AllocateRun(id, first_pos, capacity));
  }
  absl::Status Commit(uint64_t id, int64_t tokens) {
    const SealedCount count = {id, tokens};
    return index_->CommitSealed({&count, 1});
  }
  // The second layer's keys below `kept_from` are given back.
  absl::Status CommitAndVacate(uint64_t id, int64_t tokens, int64_t kept_from) {
    const SealedCount count = {id, tokens, {0, kept_from, 0}};
    return index_->CommitSealed({&count, 1});
  }
  const StoredSequence& Sequence(uint64_t id) { return index_->sequences().at(id); }
  ExtentDescriptor& Descriptor(const StoredRun& run, int layer) {
    return descriptors_[run.extents[static_cast<size_t>(layer)].extent_id];
  }
  // Writes a descriptor that agrees with itself.
  void Forge(ExtentDescriptor& descriptor) { descriptor.commit = CommitWordOf(descriptor); }

  std::vector<ExtentDescriptor> descriptors_;
  std::unique_ptr<ExtentIndex> index_;
};

TEST_F(ExtentIndexTest, ARunHasAnExtentInEveryLayer) {
  const StoredRun run = Allocate(1, 0, 128);
  ASSERT_EQ(run.extents.size(), 3u);
  EXPECT_EQ(index_->used_extents(), 3);
  EXPECT_EQ(index_->used_bytes(), 3 * 128 * kGeometry.BytesPerTokenPerLayer());
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, RepeatingTheCallReturnsTheRunThatIsThere) {
  const StoredRun first = Allocate(1, 0, 128);
  const StoredRun again = Allocate(1, 0, 128);
  EXPECT_EQ(again.extents[2].data_offset, first.extents[2].data_offset);
  EXPECT_EQ(index_->used_extents(), 3);
}

TEST_F(ExtentIndexTest, RunsFollowEachOther) {
  Allocate(1, 0, 128);
  for (const int64_t first_pos : {0, 64, 192}) {
    EXPECT_EQ(ReasonOf(index_->AllocateRun(1, first_pos, 64).status()), "RUN_DOES_NOT_FOLLOW");
  }
  EXPECT_EQ(ReasonOf(index_->AllocateRun(2, 64, 64).status()), "RUN_DOES_NOT_FOLLOW");
  Allocate(1, 128, 64);
  EXPECT_EQ(Sequence(1).capacity_tokens(), 192);
}

TEST_F(ExtentIndexTest, NamesTheFieldThatIsWrong) {
  const auto field = [this](uint64_t id, int64_t first_pos, int64_t capacity) {
    const absl::Status status = index_->AllocateRun(id, first_pos, capacity).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return FieldViolationsOf(status).at(0).field;
  };
  EXPECT_EQ(field(0, 0, 64), "sequence_id");
  for (const int64_t capacity : {int64_t{-64}, int64_t{0}, int64_t{1}, int64_t{63}, int64_t{96},
                                 2 * kGeometry.MaxExtentTokens(), INT64_MIN, INT64_MAX}) {
    EXPECT_EQ(field(1, 0, capacity), "capacity_tokens") << capacity;
  }
  for (const int64_t pos : {int64_t{-64}, int64_t{1}, INT64_MIN, INT64_MAX, kMaxPositions + 64}) {
    EXPECT_EQ(field(1, pos, 64), "first_pos") << pos;
  }
  EXPECT_EQ(index_->used_extents(), 0);
}

TEST_F(ExtentIndexTest, AllocatesAllLayersOrNone) {
  // 24 MiB are two extents of 12 MiB: not three.
  const absl::Status status = index_->AllocateRun(1, 0, kGeometry.MaxExtentTokens()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(ReasonOf(status), "SEGMENT_FULL");
  EXPECT_NE(status.message().find("0 of 25165824 bytes"), std::string::npos) << status;
  EXPECT_EQ(index_->used_bytes(), 0);
  EXPECT_TRUE(index_->sequences().empty());
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, RunsOutOfDescriptorsWithTheNumbers) {
  for (uint64_t id = 1; id <= 30; ++id) Allocate(id, 0, 64);
  const absl::Status status = index_->AllocateRun(31, 0, 64).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_NE(status.message().find("90 of 90 extents"), std::string::npos) << status;
  EXPECT_EQ(index_->Release(7), 3);
  EXPECT_TRUE(index_->AllocateRun(31, 0, 64).ok());
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, WhatIsSealedOnlyRises) {
  Allocate(1, 0, 64);
  Allocate(1, 64, 128);
  EXPECT_TRUE(Commit(1, 128).ok());
  EXPECT_TRUE(Commit(1, 64).ok());
  EXPECT_EQ(Sequence(1).sealed_tokens, 128);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, CommitsOfAllSequencesOrOfNone) {
  Allocate(1, 0, 64);
  Allocate(2, 0, 64);
  const std::vector<SealedCount> unknown = {{1, 64}, {3, 64}};
  EXPECT_TRUE(absl::IsNotFound(index_->CommitSealed(unknown)));
  for (const int64_t tokens : {int64_t{-64}, int64_t{1}, int64_t{128}, INT64_MAX}) {
    const std::vector<SealedCount> wrong = {{1, 64}, {2, tokens}};
    const absl::Status status = index_->CommitSealed(wrong);
    EXPECT_EQ(FieldViolationsOf(status).at(0).field, "sequences[1].sealed_tokens") << status;
  }
  EXPECT_EQ(Sequence(1).sealed_tokens, 0);
}

TEST_F(ExtentIndexTest, TruncatingFreesRunsAndLowersWhatIsSealed) {
  Allocate(1, 0, 64);
  Allocate(1, 64, 128);
  Allocate(1, 192, 64);
  ASSERT_TRUE(Commit(1, 256).ok());
  EXPECT_EQ(Must(index_->Truncate(1, 128)), 3);
  EXPECT_EQ(Sequence(1).sealed_tokens, 128);
  EXPECT_EQ(Sequence(1).capacity_tokens(), 192);
  EXPECT_EQ(index_->CheckInvariants(), "");
  EXPECT_EQ(Must(index_->Truncate(1, 192)), 0) << "more than is sealed changes nothing";
  EXPECT_EQ(Sequence(1).sealed_tokens, 128);
  EXPECT_EQ(Must(index_->Truncate(1, 0)), 6);
  EXPECT_TRUE(absl::IsNotFound(index_->Truncate(1, 0).status()));
  EXPECT_EQ(index_->used_bytes(), 0);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, TruncatingRefusesWhatIsNoBlockBorder) {
  Allocate(1, 0, 64);
  for (const int64_t tokens : {int64_t{-64}, int64_t{-1}, int64_t{1}, INT64_MAX}) {
    EXPECT_EQ(FieldViolationsOf(index_->Truncate(1, tokens).status()).at(0).field, "tokens");
  }
}

TEST_F(ExtentIndexTest, ARestartFindsRunsAndWhatIsSealed) {
  const StoredRun first = Allocate(5, 0, 128);
  Allocate(5, 128, 64);  // leased, nothing sealed in it
  Allocate(9, 0, 64);
  ASSERT_TRUE(Commit(5, 128).ok());
  const RecoveryReport report = Restart();
  EXPECT_EQ(report.kept_sequences, 2);
  EXPECT_EQ(report.kept_extents, 9);
  EXPECT_EQ(report.damaged_extents + report.incomplete_extents, 0);
  EXPECT_EQ(Sequence(5).sealed_tokens, 128);
  EXPECT_EQ(Sequence(5).capacity_tokens(), 192);
  EXPECT_EQ(Sequence(5).runs[0].extents[1].data_offset, first.extents[1].data_offset);
  EXPECT_EQ(Sequence(9).sealed_tokens, 0);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, ARunWithALayerMissingIsFreedAndSoIsWhatFollowsIt) {
  Allocate(1, 0, 64);
  const StoredRun second = Allocate(1, 64, 64);
  Allocate(1, 128, 64);
  ASSERT_TRUE(Commit(1, 192).ok());
  Descriptor(second, 2).commit = 0;  // as if the store had died before it was written
  const RecoveryReport report = Restart();
  EXPECT_EQ(report.incomplete_extents, 5);
  EXPECT_EQ(report.damaged_extents, 0);
  EXPECT_EQ(Sequence(1).capacity_tokens(), 64);
  EXPECT_EQ(Sequence(1).sealed_tokens, 64);
  EXPECT_EQ(index_->used_extents(), 3);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, SealedIsWhatAllLayersHaveSealed) {
  const StoredRun run = Allocate(1, 0, 256);
  ASSERT_TRUE(Commit(1, 192).ok());
  Descriptor(run, 1).sealed = SealedWord(128);
  Restart();
  EXPECT_EQ(Sequence(1).sealed_tokens, 128);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, SealedEndsAtTheFirstRunThatIsNotFull) {
  const StoredRun first = Allocate(1, 0, 128);
  Allocate(1, 128, 64);
  ASSERT_TRUE(Commit(1, 192).ok());
  for (int layer = 0; layer < 3; ++layer) Descriptor(first, layer).sealed = SealedWord(64);
  Restart();
  EXPECT_EQ(Sequence(1).sealed_tokens, 64);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, ADamagedDescriptorIsNeverServed) {
  const StoredRun run = Allocate(1, 0, 64);
  Allocate(2, 0, 64);
  const ExtentDescriptor whole = Descriptor(run, 0);
  for (size_t bit = 0; bit < 8 * sizeof(ExtentDescriptor); ++bit) {
    std::vector<ExtentDescriptor> saved = descriptors_;
    reinterpret_cast<uint8_t*>(&Descriptor(run, 0))[bit / 8] ^= 1 << bit % 8;
    const RecoveryReport report = Restart();
    EXPECT_EQ(index_->sequences().count(1), 0u) << "bit " << bit;
    EXPECT_EQ(index_->sequences().count(2), 1u) << "bit " << bit;
    EXPECT_EQ(report.damaged_extents, 1) << "bit " << bit;
    EXPECT_EQ(index_->used_extents(), 3);
    ASSERT_EQ(index_->CheckInvariants(), "");
    descriptors_ = std::move(saved);
    ASSERT_EQ(std::memcmp(&Descriptor(run, 0), &whole, sizeof(whole)), 0);
  }
}

TEST_F(ExtentIndexTest, OfTwoExtentsThatClaimTheSameBytesNoneIsServed) {
  const StoredRun first = Allocate(1, 0, 128);
  const StoredRun second = Allocate(2, 0, 64);
  Allocate(3, 0, 64);
  ExtentDescriptor& liar = Descriptor(second, 1);
  liar.data_offset = Descriptor(first, 0).data_offset +
                     64 * static_cast<uint64_t>(kGeometry.BytesPerTokenPerLayer());
  Forge(liar);
  Restart();
  EXPECT_EQ(index_->sequences().size(), 1u);
  EXPECT_EQ(index_->sequences().count(3), 1u);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, ForgedNumbersAreRefusedOneByOne) {
  const StoredRun run = Allocate(1, 0, 64);
  const std::vector<ExtentDescriptor> saved = descriptors_;
  const auto forged = [&](auto&& forge) {
    descriptors_ = saved;
    forge(Descriptor(run, 1));
    Forge(Descriptor(run, 1));
    Restart();
    EXPECT_EQ(index_->CheckInvariants(), "");
    return index_->sequences().empty();
  };
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.data_offset = kBytes; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.data_offset = UINT64_MAX - 63; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.data_offset = INT64_MAX; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.data_offset += 64; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.bytes *= 2; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.capacity_tokens = 0; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.capacity_tokens = UINT32_MAX; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.layer = 0; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.layer = 3; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.layer = UINT32_MAX; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.first_pos = -64; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.first_pos = INT64_MAX - 63; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.sequence_id = 0; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.sequence_id = 2; }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.sealed = SealedWord(128); }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.sealed = SealedWord(32); }));
  EXPECT_TRUE(forged([](ExtentDescriptor& d) { d.sealed = 64; }));
  EXPECT_FALSE(forged([](ExtentDescriptor&) {}));
}

// ---------------------------------------------------------------- vacated extents

TEST_F(ExtentIndexTest, AVacatedExtentsBytesAreAnothersAndItsRunStays) {
  const StoredRun first = Allocate(1, 0, 128);
  Allocate(1, 128, 128);
  const int64_t before = index_->used_bytes();
  ASSERT_TRUE(CommitAndVacate(1, 192, 128).ok());
  EXPECT_EQ(before - index_->used_bytes(), 128 * kGeometry.BytesPerTokenPerLayer());
  EXPECT_EQ(index_->used_extents(), 6) << "descriptors stay";
  EXPECT_TRUE(Sequence(1).runs[0].extents[1].vacated());
  EXPECT_FALSE(Sequence(1).runs[0].extents[0].vacated());
  EXPECT_FALSE(Sequence(1).runs[1].extents[1].vacated()) << "part of it lies before the window";
  EXPECT_EQ(index_->CheckInvariants(), "");
  const StoredRun other = Allocate(2, 0, 128);
  EXPECT_TRUE(std::any_of(other.extents.begin(), other.extents.end(), [&](const StoredExtent& extent) {
    return extent.data_offset == first.extents[1].data_offset;
  }));
  EXPECT_EQ(index_->CheckInvariants(), "");
  EXPECT_EQ(index_->Release(1), 6);
  EXPECT_EQ(index_->Release(2), 3);
  EXPECT_EQ(index_->used_bytes(), 0);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, VacatingIsRepeatedWithoutHarmAndNeverTakenBack) {
  Allocate(1, 0, 64);
  Allocate(1, 64, 64);
  ASSERT_TRUE(CommitAndVacate(1, 128, 64).ok());
  const int64_t used = index_->used_bytes();
  ASSERT_TRUE(CommitAndVacate(1, 128, 64).ok());
  ASSERT_TRUE(CommitAndVacate(1, 64, 0).ok()) << "a message that comes late";
  ASSERT_TRUE(Commit(1, 128).ok());
  EXPECT_EQ(index_->used_bytes(), used);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, WhatIsNotSealedIsNotVacated) {
  Allocate(1, 0, 128);
  for (const int64_t kept_from : {int64_t{-64}, int64_t{1}, int64_t{128}, INT64_MAX, INT64_MIN}) {
    const absl::Status status = CommitAndVacate(1, 64, kept_from);
    EXPECT_EQ(FieldViolationsOf(status).at(0).field, "sequences[0].kept_from[1]") << status;
  }
  const SealedCount short_one = {1, 64, {0, 0}};
  const absl::Status status = index_->CommitSealed({&short_one, 1});
  EXPECT_EQ(FieldViolationsOf(status).at(0).field, "sequences[0].kept_from") << status;
  EXPECT_EQ(Sequence(1).sealed_tokens, 0);
}

TEST_F(ExtentIndexTest, ARunWithAVacatedExtentIsNeitherHandedOutNorCut) {
  Allocate(1, 0, 128);
  Allocate(1, 128, 64);
  ASSERT_TRUE(CommitAndVacate(1, 192, 128).ok());
  EXPECT_EQ(ReasonOf(index_->AllocateRun(1, 0, 128).status()), "RUN_DOES_NOT_FOLLOW");
  EXPECT_EQ(ReasonOf(index_->Truncate(1, 64).status()), "RUN_VACATED");
  EXPECT_EQ(Sequence(1).sealed_tokens, 192);
  EXPECT_EQ(Must(index_->Truncate(1, 128)), 3);
  EXPECT_EQ(index_->CheckInvariants(), "");
  EXPECT_EQ(Must(index_->Truncate(1, 0)), 3);
  EXPECT_EQ(index_->used_bytes(), 0);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

TEST_F(ExtentIndexTest, ARestartFindsWhatIsVacated) {
  Allocate(1, 0, 128);
  Allocate(1, 128, 64);
  ASSERT_TRUE(CommitAndVacate(1, 192, 128).ok());
  Allocate(2, 0, 128);  // where the vacated one was
  const int64_t used = index_->used_bytes();
  const RecoveryReport report = Restart();
  EXPECT_EQ(report.kept_extents, 9);
  EXPECT_EQ(report.damaged_extents + report.incomplete_extents, 0);
  EXPECT_EQ(index_->used_bytes(), used);
  EXPECT_TRUE(Sequence(1).runs[0].extents[1].vacated());
  EXPECT_EQ(Sequence(1).sealed_tokens, 192);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

// A store that is killed has done the first so many of its writes.
TEST_F(ExtentIndexTest, AStoreKilledAtAnyWriteOfVacatingLeavesWholeRuns) {
  for (int64_t pos = 0; pos < 256; pos += 64) Allocate(1, pos, 64);
  ASSERT_TRUE(Commit(1, 256).ok());
  const std::vector<ExtentDescriptor> before = descriptors_;
  const SealedCount count = {1, 256, {128, 0, 192}};
  ASSERT_TRUE(index_->CommitSealed({&count, 1}).ok());
  std::vector<std::pair<ExtentDescriptor*, uint64_t>> writes;  // in their order
  for (const StoredRun& run : Sequence(1).runs) {
    for (const StoredExtent& extent : run.extents) {
      const ExtentDescriptor& after = descriptors_[extent.extent_id];
      ExtentDescriptor unchanged = before[extent.extent_id];
      unchanged.vacated = after.vacated;
      ASSERT_EQ(std::memcmp(&unchanged, &after, sizeof(after)), 0) << "vacating writes one word";
      if (after.vacated != 0) {
        writes.emplace_back(&descriptors_[extent.extent_id], after.vacated);
      }
    }
  }
  ASSERT_EQ(writes.size(), 5u);
  for (size_t done = 0; done <= writes.size(); ++done) {
    std::copy(before.begin(), before.end(), descriptors_.begin());
    for (size_t i = 0; i < done; ++i) writes[i].first->vacated = writes[i].second;
    const RecoveryReport report = Restart();
    EXPECT_EQ(report.kept_extents, 12) << done;
    EXPECT_EQ(report.damaged_extents + report.incomplete_extents, 0) << done;
    EXPECT_EQ(Sequence(1).sealed_tokens, 256);
    EXPECT_EQ(index_->used_bytes(),
              static_cast<int64_t>(12 - done) * 64 * kGeometry.BytesPerTokenPerLayer());
    ASSERT_EQ(index_->CheckInvariants(), "");
  }
}

TEST_F(ExtentIndexTest, VacatedExtentsThatCannotBeEndTheSequence) {
  const StoredRun first = Allocate(1, 0, 64);
  const StoredRun second = Allocate(1, 64, 64);
  ASSERT_TRUE(Commit(1, 128).ok());
  const std::vector<ExtentDescriptor> saved = descriptors_;
  // What is kept when `forge` has been at work, in tokens.
  const auto kept = [&](auto&& forge) {
    descriptors_ = saved;
    forge();
    Restart();
    EXPECT_EQ(index_->CheckInvariants(), "");
    return index_->sequences().empty() ? 0 : Sequence(1).capacity_tokens();
  };
  const auto vacate = [&](const StoredRun& run, int layer) {
    Descriptor(run, layer).vacated = Descriptor(run, layer).commit;
  };
  EXPECT_EQ(kept([&] { vacate(first, 2); }), 128);
  EXPECT_EQ(kept([&] { vacate(second, 2); }), 64) << "the older one of the layer is there";
  EXPECT_EQ(kept([&] { vacate(first, 1), vacate(second, 2); }), 64) << "... of another layer";
  EXPECT_EQ(kept([&] { Descriptor(first, 2).vacated = 1; }), 0);
  EXPECT_EQ(kept([&] {
              vacate(first, 2);
              Descriptor(first, 2).sealed = SealedWord(0);
            }),
            0);
  EXPECT_EQ(kept([&] {
              vacate(first, 2);
              Descriptor(first, 0).sealed = SealedWord(0);
            }),
            0)
      << "what another layer has not sealed cannot be written any more";
  EXPECT_EQ(kept([&] {
              vacate(first, 2), vacate(second, 2);
              Descriptor(second, 0).sealed = SealedWord(0);
            }),
            64);
}

TEST_F(ExtentIndexTest, ATwinOfARunDoesNotHideTheWholeOne) {
  const StoredRun run = Allocate(1, 0, 128);
  ASSERT_TRUE(Commit(1, 128).ok());
  // One extent of another run of the same sequence and position, as a half-made one would leave.
  ExtentDescriptor& twin = descriptors_[80];
  twin = Descriptor(run, 0);
  twin.capacity_tokens = 64;
  twin.bytes /= 2;
  twin.data_offset = 20 << 20;
  twin.data_offset -= twin.data_offset % twin.bytes;
  twin.sealed = SealedWord(0);
  Forge(twin);
  const RecoveryReport report = Restart();
  EXPECT_EQ(report.incomplete_extents, 1);
  EXPECT_EQ(Sequence(1).sealed_tokens, 128);
  EXPECT_EQ(index_->CheckInvariants(), "");
}

}  // namespace
}  // namespace headroom::kvstore
