// Where keys lie on the device: tails, slots, resident copies, and what is evicted for what.
#include "services/worker/gpu_kv.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <vector>

namespace headroom {
namespace {

class GpuKvTest : public ::testing::Test {
 protected:
  static constexpr KvGeometry kGeometry{2, 3, 64};
  static constexpr int64_t kHeadBlockBytes = 64 * 256;
  static constexpr int64_t kTailBytes = 2 * 3 * 4 * kHeadBlockBytes;
  static constexpr int64_t kDrawStateBytes = kHeadBlockBytes;

  void Start(int64_t pool_bytes, int32_t max_sequences = 4) {
    pool_.resize(pool_bytes);
    kv_ = std::make_unique<GpuKv>(kGeometry, pool_.data(), pool_bytes, max_sequences,
                                  kDrawStateBytes);
    kv_->SetSegment({segment_.data(), static_cast<int64_t>(segment_.size())});
  }
  static headroom::Run RunAt(int64_t first_pos, int64_t capacity, int64_t offset = 0) {
    return {first_pos, capacity, {offset, offset + capacity * 768}};
  }
  static Plan PlanOf(Lane lane, int32_t resident_heads = 0) {
    Plan plan;
    plan.layers.resize(2);
    for (auto& ranges : plan.layers) {
      if (resident_heads > 0) ranges.push_back({Lane::kResident, 0, resident_heads});
      if (resident_heads < 3) ranges.push_back({lane, resident_heads, 3});
    }
    return plan;
  }
  // How many copies were made.
  int Apply(const Plan& plan) {
    int copies = 0;
    kv_->ApplyPlan(plan, [&](const GpuKv::Sequence& sequence, int run, int32_t layer,
                             int32_t head) {
      EXPECT_NE(kv_->Resident(sequence, run, layer, head).base, nullptr);
      ++copies;
    });
    return copies;
  }
  int Residents(uint64_t id, int run) {
    int copies = 0;
    for (int32_t layer = 0; layer < 2; ++layer) {
      for (int32_t head = 0; head < 3; ++head) {
        copies += kv_->Resident(*kv_->Find(id), run, layer, head).base != nullptr;
      }
    }
    return copies;
  }

  std::vector<uint8_t> pool_;
  std::vector<uint8_t> segment_ = std::vector<uint8_t>(1 << 20);
  std::unique_ptr<GpuKv> kv_;
};

TEST_F(GpuKvTest, OpensGrantsAndCloses) {
  Start(3 * kTailBytes);
  EXPECT_TRUE(kv_->Open({7, {RunAt(0, 64)}, 64}).ok());
  EXPECT_EQ(kv_->Open({7, {}, 0}).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(kv_->Find(7)->sealed_tokens, 64);
  EXPECT_EQ(kv_->Find(7)->capacity_tokens(), 64);
  EXPECT_TRUE(kv_->Grant({7, RunAt(64, 128, 100 << 10)}).ok());
  EXPECT_EQ(kv_->Find(7)->capacity_tokens(), 192);
  EXPECT_EQ(kv_->Grant({8, RunAt(0, 64)}).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(kv_->pool().used_bytes(), kTailBytes);
  EXPECT_FALSE(kv_->TakeFreed());
  kv_->Close(8);  // unknown: nothing
  EXPECT_FALSE(kv_->TakeFreed());
  kv_->Close(7);
  EXPECT_TRUE(kv_->TakeFreed());
  EXPECT_FALSE(kv_->TakeFreed());
  EXPECT_EQ(kv_->pool().used_bytes(), 0);
  EXPECT_EQ(kv_->num_open(), 0);
}

TEST_F(GpuKvTest, AHistoryTakesMemoryOnlyWhereThereIsOne) {
  Start(2 * kTailBytes + kDrawStateBytes);
  ASSERT_TRUE(kv_->Open({1, {}, 0}).ok());
  EXPECT_EQ(kv_->pool().used_bytes(), kTailBytes);
  EXPECT_EQ(kv_->Find(1)->draw_state, nullptr);
  ASSERT_TRUE(kv_->Open({2, {}, 0, DrawHistory()}).ok());
  EXPECT_EQ(kv_->pool().used_bytes(), 2 * kTailBytes + kDrawStateBytes);
  EXPECT_NE(kv_->Find(2)->draw_state, nullptr);
  kv_->Close(1);
  EXPECT_EQ(kv_->Open({3, {}, 0, DrawHistory()}).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(kv_->pool().used_bytes(), kTailBytes + kDrawStateBytes);
  kv_->Close(2);
  EXPECT_EQ(kv_->pool().used_bytes(), 0);
}

TEST_F(GpuKvTest, RefusesRunsThatDoNotFit) {
  Start(2 * kTailBytes);
  const auto code = [&](const headroom::Run& run) { return kv_->Open({1, {run}, 0}).code(); };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code(RunAt(64, 64)), kInvalid);                 // does not begin at 0
  EXPECT_EQ(code(RunAt(0, 32)), kInvalid);                  // less than a block
  EXPECT_EQ(code(RunAt(0, 192)), kInvalid);                 // no power of two
  EXPECT_EQ(code(RunAt(0, -64)), kInvalid);
  EXPECT_EQ(code(RunAt(0, int64_t{1} << 40)), kInvalid);    // larger than an extent may be
  EXPECT_EQ(code(RunAt(0, 64, -64)), kInvalid);             // in front of the segment
  EXPECT_EQ(code(RunAt(0, 64, 32)), kInvalid);              // not aligned
  EXPECT_EQ(code(RunAt(0, 64, (1 << 20) - 64 * 768)), kInvalid);  // layer 1 is behind its end
  EXPECT_EQ(code(RunAt(0, 64, std::numeric_limits<int64_t>::max() / 64 * 64 - (1 << 20))), kInvalid);
  EXPECT_EQ(code({0, 64, {0}}), kInvalid);                  // one layer is missing
  EXPECT_EQ(kv_->Open({1, {RunAt(0, 64)}, 128}).code(), kInvalid);
  EXPECT_EQ(kv_->Open({1, {RunAt(0, 64)}, 10}).code(), kInvalid);
  EXPECT_EQ(kv_->Open({1, {RunAt(0, 64)}, -64}).code(), kInvalid);
  EXPECT_EQ(kv_->pool().used_bytes(), 0);
  EXPECT_EQ(kv_->num_open(), 0);
  EXPECT_EQ(code(RunAt(0, 64, (1 << 20) - 2 * 64 * 768)), absl::StatusCode::kOk);
  EXPECT_EQ(kv_->Grant({1, RunAt(0, 64)}).code(), kInvalid);    // again from the start
  EXPECT_EQ(kv_->Grant({1, RunAt(128, 64)}).code(), kInvalid);  // a hole
}

TEST_F(GpuKvTest, SlotsAreDistinctAndRunOut) {
  Start(8 * kTailBytes, /*max_sequences=*/3);
  std::set<int32_t> slots;
  for (uint64_t id = 1; id <= 3; ++id) {
    ASSERT_TRUE(kv_->Open({id, {}, 0}).ok());
    slots.insert(kv_->Find(id)->slot);
  }
  EXPECT_EQ(slots.size(), 3u);
  EXPECT_EQ(*slots.begin(), 0);
  EXPECT_EQ(*slots.rbegin(), 2);
  EXPECT_EQ(kv_->Open({4, {}, 0}).code(), absl::StatusCode::kResourceExhausted);
  const int32_t slot = kv_->Find(2)->slot;
  kv_->Close(2);
  EXPECT_TRUE(kv_->Open({4, {}, 0}).ok());
  EXPECT_EQ(kv_->Find(4)->slot, slot);
  kv_->CloseAll();
  EXPECT_EQ(kv_->num_open(), 0);
  EXPECT_EQ(kv_->pool().used_bytes(), 0);
}

TEST_F(GpuKvTest, CopiesAreWhatThePlanSays) {
  Start(4 * kTailBytes);
  ASSERT_TRUE(kv_->Open({1, {RunAt(0, 64), RunAt(64, 128)}, 64}).ok());
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched)), 0);
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched, 2)), 2 * 2 * 2);  // runs, layers, heads
  EXPECT_EQ(kv_->pool().used_bytes(), kTailBytes + 2 * 2 * 3 * kHeadBlockBytes);
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched, 2)), 0);  // they are there
  EXPECT_FALSE(kv_->TakeFreed());
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched, 1)), 0);
  EXPECT_TRUE(kv_->TakeFreed());
  EXPECT_EQ(Residents(1, 0), 2);
  EXPECT_EQ(Residents(1, 1), 2);
  // A head split at the border of the runs.
  Plan split = PlanOf(Lane::kFetched);
  for (auto& ranges : split.layers) {
    ranges = {{Lane::kFetched, 0, 3, 0, 64}, {Lane::kResident, 0, 3, 64}};
  }
  EXPECT_EQ(Apply(split), 4);  // head 0 of the second run is there
  EXPECT_EQ(Residents(1, 0), 0);
  EXPECT_EQ(Residents(1, 1), 6);
  const kernels::KvSpan span = kv_->Resident(*kv_->Find(1), 1, 1, 2);
  EXPECT_EQ(span.first_pos, 64);
  EXPECT_EQ(span.origin_pos, 64);
  EXPECT_EQ(span.capacity, 128);
  EXPECT_EQ(span.kv_head_begin, 2);
  EXPECT_EQ(span.kv_head_end, 3);
  // In-place keys have no copy either.
  EXPECT_EQ(Apply(PlanOf(Lane::kInPlace)), 0);
  EXPECT_EQ(kv_->pool().used_bytes(), kTailBytes);
}

TEST_F(GpuKvTest, WhatOneCopyGivesUpAnotherMayUse) {
  Start(kTailBytes + 2 * kHeadBlockBytes);
  ASSERT_TRUE(kv_->Open({1, {RunAt(0, 64)}, 64}).ok());
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched, 1)), 2);
  Plan other = PlanOf(Lane::kFetched);
  for (auto& ranges : other.layers) ranges = {{Lane::kFetched, 0, 2}, {Lane::kResident, 2, 3}};
  EXPECT_EQ(Apply(other), 2);
  // More than fits: as many as do.
  EXPECT_EQ(Apply(PlanOf(Lane::kResident, 3)), 0);
  EXPECT_EQ(Residents(1, 0), 2);
}

TEST_F(GpuKvTest, CopiesMakeRoomForATail) {
  Start(2 * kTailBytes);
  ASSERT_TRUE(kv_->Open({1, {RunAt(0, 64), RunAt(64, 128)}, 0}).ok());
  EXPECT_EQ(Apply(PlanOf(Lane::kFetched, 3)), 12);
  EXPECT_FALSE(kv_->TakeFreed());
  ASSERT_TRUE(kv_->Open({2, {}, 0}).ok());
  EXPECT_TRUE(kv_->TakeFreed());
  EXPECT_EQ(Residents(1, 0), 0);  // the oldest positions first
  EXPECT_EQ(kv_->Open({3, {}, 0}).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Residents(1, 1), 0);  // all were given up, and it was not enough
  EXPECT_EQ(kv_->pool().used_bytes(), 2 * kTailBytes);
}

TEST_F(GpuKvTest, KnowsWhatItHoldsAlready) {
  Start(2 * kTailBytes);
  const OpenSequence open{1, {RunAt(0, 64)}, 0};
  EXPECT_FALSE(kv_->Holds(open));
  ASSERT_TRUE(kv_->Open(open).ok());
  EXPECT_TRUE(kv_->Holds(open));
  const RunGrant grant{1, RunAt(64, 64, 128 << 10)};
  EXPECT_FALSE(kv_->Holds(grant));
  ASSERT_TRUE(kv_->Grant(grant).ok());
  EXPECT_TRUE(kv_->Holds(grant));
  EXPECT_TRUE(kv_->Holds(open));
  EXPECT_FALSE(kv_->Holds(OpenSequence{1, {RunAt(0, 64, 128 << 10)}, 0}));
  EXPECT_FALSE(kv_->Holds(RunGrant{1, RunAt(64, 64, 64 << 10)}));
}

}  // namespace
}  // namespace headroom
