// The store without its RPCs: binding, recovery on opening, and calls from many threads.
#include "services/kvstore/kv_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <set>
#include <thread>

#include "common/errors.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

constexpr int64_t kUnitBytes = 64 * 2 * 2 * 64 * 2;  // a block of one layer of kSmallGeometry

TEST(KvStore, RefusesEverythingUntilAModelIsBound) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  const std::vector<SealedCount> count = {{1, 64}};
  const std::vector<uint64_t> ids = {1};
  for (const absl::Status& status :
       {store->AllocateRun(1, 0, 64).status(), store->CommitSealed(count),
        store->Truncate(1, 0).status(), store->Release(ids).status(),
        store->List(0, 10, 10).status()}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(ReasonOf(status), "NO_MODEL_BOUND");
  }
  EXPECT_FALSE(store->Facts().binding.has_value());
}

TEST(KvStore, OtherGeometriesOfOneFingerprintAreOtherModels) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  EXPECT_EQ(Must(store->Bind(BindingOf(kSmallGeometry, 1), false)), 0);
  Must(store->AllocateRun(1, 0, 64));
  EXPECT_EQ(Must(store->Bind(BindingOf(kSmallGeometry, 1), false)), 1);
  const absl::Status status = store->Bind(BindingOf(kThreeHeads, 1), false).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_EQ(ReasonOf(status), "OTHER_MODEL");
  EXPECT_EQ(store->Facts().binding, BindingOf(kSmallGeometry, 1));
  EXPECT_EQ(Must(store->Bind(BindingOf(kThreeHeads, 1), true)), 0);
  EXPECT_EQ(store->Facts().used_bytes, 0);
  EXPECT_EQ(Must(store->AllocateRun(1, 0, 64)).extents.size(), 3u);
}

TEST(KvStore, ASegmentWithoutSequencesTakesAnotherModelWithoutAsking) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  Must(store->Bind(BindingOf(kSmallGeometry, 1), false));
  Must(store->AllocateRun(1, 0, 64));
  const std::vector<uint64_t> ids = {1, 77};
  EXPECT_EQ(Must(store->Release(ids)), 2) << "unknown ones are ignored";
  EXPECT_EQ(Must(store->Bind(BindingOf(kThreeHeads, 2), false)), 0);
}

TEST(KvStore, GeometriesThatCannotBeLaidOutAreRefusedByName) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  for (const KvGeometry& geometry : {KvGeometry{0, 2, 64}, KvGeometry{2, -1, 64},
                                     KvGeometry{2, 2, INT32_MAX}, KvGeometry{2, 4096, 4096}}) {
    const absl::Status status = store->Bind(BindingOf(geometry, 1), true).status();
    ASSERT_EQ(FieldViolationsOf(status).size(), 1u) << status;
    EXPECT_EQ(FieldViolationsOf(status)[0].field, "geometry");
  }
}

TEST(KvStore, ANewStoreFindsWhatTheOldOneHeldUnderANewGeneration) {
  const TempSegmentDir dir;
  StoreFacts before;
  StoredRun run;
  {
    const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
    Must(store->Bind(BindingOf(kThreeHeads, 1), false));
    run = Must(store->AllocateRun(7, 0, 256));
    Must(store->AllocateRun(7, 256, 64));
    Must(store->AllocateRun(9, 0, 64));
    const std::vector<SealedCount> counts = {{7, 256}};
    ASSERT_TRUE(store->CommitSealed(counts).ok());
    before = store->Facts();
  }
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  const StoreFacts after = store->Facts();
  EXPECT_GT(after.generation, before.generation);
  EXPECT_EQ(after.binding, before.binding);
  EXPECT_EQ(after.used_bytes, before.used_bytes);
  EXPECT_EQ(after.used_extents, 9);
  const KvStore::Page page = Must(store->List(0, 10, 1000));
  ASSERT_EQ(page.sequences.size(), 2u);
  EXPECT_EQ(page.sequences[0].first, 7u);
  EXPECT_EQ(page.sequences[0].second.sealed_tokens, 256);
  ASSERT_EQ(page.sequences[0].second.runs.size(), 2u);
  for (size_t layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(page.sequences[0].second.runs[0].extents[layer].data_offset,
              run.extents[layer].data_offset);
  }
  EXPECT_EQ(page.sequences[1].second.sealed_tokens, 0);
  // The bytes of what was kept are not handed out again.
  std::set<int64_t> offsets;
  for (const auto& [id, sequence] : page.sequences) {
    for (const StoredRun& kept : sequence.runs) {
      for (const StoredExtent& extent : kept.extents) offsets.insert(extent.data_offset);
    }
  }
  for (const StoredExtent& extent : Must(store->AllocateRun(11, 0, 64)).extents) {
    EXPECT_TRUE(offsets.insert(extent.data_offset).second);
  }
}

TEST(KvStore, PagesEndAtTheSequencesOrExtentsAskedFor) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir)));
  Must(store->Bind(BindingOf(kSmallGeometry, 1), false));
  for (const uint64_t id : {5, 1, 9, 3}) Must(store->AllocateRun(id, 0, 64));
  const KvStore::Page first = Must(store->List(0, 3, 1000));
  ASSERT_EQ(first.sequences.size(), 3u);
  EXPECT_EQ(first.sequences[2].first, 5u);
  EXPECT_TRUE(first.more);
  const KvStore::Page last = Must(store->List(5, 3, 1000));
  ASSERT_EQ(last.sequences.size(), 1u);
  EXPECT_FALSE(last.more);
  const KvStore::Page few_extents = Must(store->List(0, 1000, 3));
  EXPECT_EQ(few_extents.sequences.size(), 2u) << "two extents each: the second goes beyond three";
  EXPECT_TRUE(few_extents.more);
  EXPECT_TRUE(Must(store->List(9, 3, 1000)).sequences.empty());
  EXPECT_TRUE(Must(store->List(UINT64_MAX, 3, 1000)).sequences.empty());
}

TEST(KvStore, TellsWhatItHoldsAndCanHold) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir, 8 << 20, 256)));
  ASSERT_TRUE(store->WaitUntilReady().ok());
  Must(store->Bind(BindingOf(kThreeHeads, 1), false));
  StoreFacts facts = store->Facts();
  const int64_t unit = 64 * 3 * 2 * 64 * 2;
  EXPECT_EQ(facts.capacity_bytes, (8 << 20) / unit * unit) << "whole units only";
  EXPECT_EQ(facts.ready_bytes, 8 << 20);
  EXPECT_EQ(facts.max_extents, 256);
  EXPECT_EQ(facts.segment_dir, dir.path());
  EXPECT_EQ(facts.used_bytes, 0);
  Must(store->AllocateRun(1, 0, 128));
  facts = store->Facts();
  EXPECT_EQ(facts.used_bytes, 3 * 2 * unit);
  EXPECT_EQ(facts.used_extents, 3);
}

// Extents lie there: the rest of a segment may come later.
TEST(KvStore, MemoryOfTheFirstPieceIsThereBeforeItServes) {
  const TempSegmentDir dir;
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(SmallSegment(dir, 128 << 20)));
  EXPECT_EQ(store->Facts().ready_bytes, 128 << 20);
}

// Each thread keeps its own sequences; all of them share memory, descriptors and the index.
TEST(KvStore, CallsFromManyThreadsDoNotDisturbEachOther) {
  const TempSegmentDir dir;
  const SegmentOptions options = SmallSegment(dir, 64 << 20, 4096);
  constexpr int kThreads = 4, kSequences = 6;
  {
    const std::unique_ptr<KvStore> store = Must(KvStore::Open(options));
    Must(store->Bind(BindingOf(kSmallGeometry, 1), false));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&store, &wrong, thread] {
        for (int round = 0; round < 20; ++round) {
          for (uint64_t i = 0; i < kSequences; ++i) {
            const uint64_t id = 1 + i * kThreads + thread;
            int64_t end = 0;
            for (const int64_t tokens : {64, 64, 128}) {
              const auto run = store->AllocateRun(id, end, tokens);
              wrong += !run.ok() || run->extents.size() != 2;
              end += tokens;
              const std::vector<SealedCount> counts = {{id, end}};
              wrong += !store->CommitSealed(counts).ok();
            }
            wrong += store->Truncate(id, 64).value_or(-1) != 4;
            const std::vector<uint64_t> ids = {id};
            if (round < 19) wrong += store->Release(ids).value_or(-1) != 2;
          }
          wrong += store->Facts().used_extents % 2;
          wrong += !store->List(0, 100, 1000).ok();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(store->Facts().used_bytes, kThreads * kSequences * 2 * kUnitBytes);
  }
  const std::unique_ptr<KvStore> store = Must(KvStore::Open(options));
  const KvStore::Page page = Must(store->List(0, 100, 1000));
  ASSERT_EQ(page.sequences.size(), size_t{kThreads * kSequences});
  for (const auto& [id, sequence] : page.sequences) EXPECT_EQ(sequence.sealed_tokens, 64);
}

}  // namespace
}  // namespace headroom::kvstore
