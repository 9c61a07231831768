// What is bookkeeping and numbers alone: discarded steps, tiling, the pool, the keys' places, the budget's
// division.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "services/worker/device_budget.h"
#include "services/worker/discarded_steps.h"
#include "services/worker/gpu_kv.h"
#include "services/worker/kv_pool.h"
#include "services/worker/tiling.h"

namespace headroom {
namespace {

// ---------------------------------------------------------------- discarded steps

// A token of each of these sequences.
Step TokensOf(const std::vector<std::pair<uint64_t, int64_t>>& sequences) {
  Step step;
  for (const auto& [id, pos] : sequences) {
    StepSequence& sequence = step.sequences.emplace_back();
    sequence.sequence_id = id;
    sequence.first_pos = pos;
  }
  return step;
}

TEST(DiscardedSteps, WhatGoesOnFromOneDoesNotCountUntilItIsDoneAgain) {
  DiscardedSteps steps;
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 10}, {2, 5}})));
  steps.Discard(TokensOf({{1, 11}}), /*run=*/true);
  EXPECT_TRUE(steps.MayRun(TokensOf({{1, 12}}))) << "on wrong numbers, but it can be";
  EXPECT_FALSE(steps.Counts(TokensOf({{2, 6}, {1, 12}})));
  EXPECT_TRUE(steps.Counts(TokensOf({{2, 6}})));
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 11}})));
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 12}})));
}

TEST(DiscardedSteps, WhatWasNotRunMustBeRunBeforeWhatGoesOnFromIt) {
  DiscardedSteps steps;
  steps.Discard(TokensOf({{1, 11}}), /*run=*/false);
  EXPECT_FALSE(steps.MayRun(TokensOf({{1, 12}})));
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 10}}))) << "an earlier step ends; nothing is made good by it";
  EXPECT_FALSE(steps.MayRun(TokensOf({{1, 12}})));
  EXPECT_TRUE(steps.MayRun(TokensOf({{1, 11}})));
  EXPECT_TRUE(steps.MayRun(TokensOf({{1, 12}}))) << "behind it";
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 11}})));
  EXPECT_TRUE(steps.Counts(TokensOf({{1, 12}})));
}

TEST(DiscardedSteps, AnAbandonedSequenceIsNotRunUntilItIsClosed) {
  DiscardedSteps steps;
  EXPECT_FALSE(steps.AllAbandoned(TokensOf({{1, 10}})));
  steps.Abandon({1});
  EXPECT_TRUE(steps.AllAbandoned(TokensOf({{1, 10}})));
  EXPECT_FALSE(steps.AllAbandoned(TokensOf({{1, 10}, {2, 5}})));
  EXPECT_FALSE(steps.MayRun(TokensOf({{2, 5}, {1, 10}})));
  EXPECT_TRUE(steps.MayRun(TokensOf({{2, 5}})));
  steps.Close({1});
  EXPECT_TRUE(steps.MayRun(TokensOf({{1, 0}})));
  // More than there can be at a time have no effect, and take no memory.
  steps.Abandon(std::vector<uint64_t>(2000, 3));
  EXPECT_TRUE(steps.MayRun(TokensOf({{3, 0}})));
}

// ---------------------------------------------------------------- tiling

TEST(Tiling, CoversEveryKeyOnceInOrderWithinTheSize) {
  const struct {
    Tiling tiling;
    int32_t heads_at_once;
  } ways[] = {{Tiling::kDecode, 1}, {Tiling::kPrefill, 1}, {Tiling::kPrefill, 4}, {Tiling::kPrefill, 16}};
  for (const auto& [tiling, heads_at_once] : ways) {
    for (const int32_t heads : {1, 2, 3, 8}) {
      for (const int64_t blocks : {1, 2, 3, 4, 5, 9, 64, 700}) {
        for (const Rectangle& fetched : std::vector<Rectangle>{{0, heads, 0, 64},
                                                               {0, heads, 0, 1024},
                                                               {1, 1 + heads, 64, 192},
                                                               {2, 2 + heads, 256, 256 + 4096},
                                                               {0, heads, 960, 33024}}) {
          const KvGeometry geometry{2, 16, 64};
          const int64_t max_bytes = blocks * kBlockTokens * geometry.BytesPerTokenPerHead();
          std::vector<Rectangle> tiles;
          CutIntoTiles(tiling, heads_at_once, geometry, fetched, max_bytes, tiles);
          // Per head: what has been covered so far. Heads of a tile lie together.
          std::map<int32_t, int64_t> covered;
          int64_t bytes = 0;
          for (const Rectangle& tile : tiles) {
            const int64_t tokens = tile.end_pos - tile.first_pos;
            const int64_t tile_bytes = tokens * (tile.kv_head_end - tile.kv_head_begin) *
                                       geometry.BytesPerTokenPerHead();
            ASSERT_GT(tokens, 0);
            ASSERT_LE(tile_bytes, max_bytes);
            ASSERT_EQ(tile.first_pos % kBlockTokens, 0);
            // A border inside of the rectangle is a unit's, if a unit fits and the rectangle begins
            // at one.
            if (fetched.first_pos % kUnitTokens == 0 && blocks >= kUnitTokens / kBlockTokens) {
              ASSERT_EQ(tile.first_pos % kUnitTokens, 0);
            }
            bytes += tile_bytes;
            for (int32_t head = tile.kv_head_begin; head < tile.kv_head_end; ++head) {
              ASSERT_GE(head, fetched.kv_head_begin);
              ASSERT_LT(head, fetched.kv_head_end);
              const auto at = covered.try_emplace(head, fetched.first_pos).first;
              ASSERT_EQ(at->second, tile.first_pos);
              at->second = tile.end_pos;
            }
          }
          ASSERT_EQ(static_cast<int32_t>(covered.size()), heads);
          for (const auto& [head, end] : covered) ASSERT_EQ(end, fetched.end_pos) << head;
          ASSERT_EQ(bytes, heads * (fetched.end_pos - fetched.first_pos) *
                               geometry.BytesPerTokenPerHead());
        }
      }
    }
  }
}

TEST(Tiling, NothingGivesNoTiles) {
  std::vector<Rectangle> tiles;
  CutIntoTiles(Tiling::kDecode, 1, {1, 1, 64}, {0, 0, 0, 64}, 1 << 20, tiles);
  CutIntoTiles(Tiling::kPrefill, 1, {1, 1, 64}, {0, 1, 64, 64}, 1 << 20, tiles);
  EXPECT_TRUE(tiles.empty());
}

TEST(Tiling, DecodeTakesAllHeadsOfAnExtentPrefillFewHeadsOfManyTokens) {
  const KvGeometry geometry{32, 8, 128};  // 4 KiB a token and layer
  std::vector<Rectangle> tiles;
  CutIntoTiles(Tiling::kDecode, 1, geometry, {0, 8, 0, 16384}, 16 << 20, tiles);
  ASSERT_EQ(tiles.size(), 4u);
  EXPECT_EQ(tiles[0].kv_head_end, 8);
  EXPECT_EQ(tiles[0].end_pos, 4096);
  tiles.clear();
  CutIntoTiles(Tiling::kPrefill, 1, geometry, {0, 8, 0, 16384}, 16 << 20, tiles);
  ASSERT_EQ(tiles.size(), 4u);
  EXPECT_EQ(tiles[0].kv_head_end, 2);
  EXPECT_EQ(tiles[0].end_pos, 16384);
}

// However long the context: a call of attention is filled, and no tile leaves one half empty.
TEST(Tiling, PrefillTakesHeadsAsAttentionDoes) {
  const KvGeometry geometry{42, 8, 256};  // 1 KiB a token, layer and head
  for (const int64_t tokens : {16384, 24576, 40960, 73728, 131072, 1 << 20}) {
    std::vector<Rectangle> tiles;
    CutIntoTiles(Tiling::kPrefill, 4, geometry, {0, 8, 0, tokens}, 128 << 20, tiles);
    for (const Rectangle& tile : tiles) {
      EXPECT_EQ((tile.kv_head_end - tile.kv_head_begin) % 4, 0) << tokens;
      EXPECT_TRUE(tile.end_pos % kernels::kWidePieceTokens == 0 || tile.end_pos == tokens);
    }
    if (tokens == 131072) {
      EXPECT_EQ(tiles.size(), 8u);
    }
  }
  // Not where only shorter ones than a piece would fit.
  std::vector<Rectangle> tiles;
  CutIntoTiles(Tiling::kPrefill, 4, geometry, {0, 8, 0, 16384}, 16 << 20, tiles);
  EXPECT_EQ(tiles[0].kv_head_end, 1);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 16, 8, 256}, 8192), 4);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 32, 8, 128}, 8192), 2);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 32, 8, 128}, 100), 1);
  EXPECT_EQ(kernels::WideHeadsAtOnce({}, 8192), 1);
}

// ---------------------------------------------------------------- pool

TEST(KvPool, GivesDisjointRangesUntilNothingIsLeft) {
  std::vector<uint8_t> memory(200 * 64);
  KvPool pool(memory.data(), static_cast<int64_t>(memory.size()) + 63, 64);
  EXPECT_EQ(pool.capacity_bytes(), 200 * 64);
  // A model of it: which granules are taken.
  std::vector<bool> taken(200, false);
  std::vector<std::pair<int64_t, int64_t>> held;  // granule, bytes
  uint64_t random = 1;
  const auto draw = [&](uint64_t below) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<int64_t>((random >> 33) % below);
  };
  int64_t used = 0;
  int64_t most = 0;
  int refusals = 0;
  for (int i = 0; i < 20000; ++i) {
    if (!held.empty() && draw(5) < 2) {
      const auto at = held.begin() + draw(held.size());
      pool.Free(memory.data() + at->first * 64, at->second);
      const int64_t granules = (at->second + 63) / 64;
      for (int64_t g = 0; g < granules; ++g) taken[at->first + g] = false;
      used -= granules;
      held.erase(at);
    } else {
      const int64_t bytes = 1 + draw(draw(10) == 0 ? 100 * 64 : 6 * 64);
      const int64_t granules = (bytes + 63) / 64;
      uint8_t* const data = pool.Allocate(bytes);
      if (data == nullptr) {
        ++refusals;
        // Right: there is no free run that long.
        int64_t run = 0;
        for (int64_t g = 0; g < 200; ++g) {
          run = taken[g] ? 0 : run + 1;
          ASSERT_LT(run, granules);
        }
      } else {
        const int64_t first = (data - memory.data()) / 64;
        ASSERT_EQ((data - memory.data()) % 64, 0);
        ASSERT_LE(first + granules, 200);
        for (int64_t g = first; g < first + granules; ++g) {
          ASSERT_FALSE(taken[g]);
          taken[g] = true;
        }
        used += granules;
        held.emplace_back(first, bytes);
      }
    }
    most = std::max(most, used);
    ASSERT_EQ(pool.used_bytes(), used * 64);
    ASSERT_EQ(pool.free_bytes(), (200 - used) * 64);
    ASSERT_EQ(pool.high_water_bytes(), most * 64);
  }
  EXPECT_GT(refusals, 100);
}

TEST(KvPool, RefusesNothingAndTooMuch) {
  std::vector<uint8_t> memory(4 * 64);
  KvPool pool(memory.data(), 4 * 64, 64);
  EXPECT_EQ(pool.Allocate(0), nullptr);
  EXPECT_EQ(pool.Allocate(4 * 64 + 1), nullptr);
  EXPECT_EQ(pool.Allocate(std::numeric_limits<int64_t>::max()), nullptr);
  EXPECT_NE(pool.Allocate(4 * 64), nullptr);
  EXPECT_EQ(pool.Allocate(1), nullptr);
}

// ---------------------------------------------------------------- keys' places

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

// ---------------------------------------------------------------- budget

ModelConfig Llama(int32_t layers, int32_t q_heads, int32_t kv_heads, int32_t head_dim,
                  int64_t hidden, int64_t intermediate, int64_t vocab) {
  ModelConfig config;
  config.num_layers = layers;
  config.num_q_heads = q_heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.hidden = hidden;
  config.intermediate = intermediate;
  config.vocab = vocab;
  return config;
}

struct BudgetCase {
  const char* name;
  ModelConfig config;
  int64_t weights_bytes;
};

std::vector<BudgetCase> BudgetCases() {
  return {{"SmolLM2-135M", Llama(30, 9, 3, 64, 576, 1536, 49152), int64_t{257} << 20},
          {"Llama-3-8B", Llama(32, 32, 8, 128, 4096, 14336, 128256), int64_t{15317} << 20},
          {"tiny", Llama(2, 4, 2, 64, 96, 136, 211), int64_t{1} << 20}};
}

TEST(DivideBudget, GivesAllOfItAndNoMore) {
  for (const BudgetCase& c : BudgetCases()) {
    SCOPED_TRACE(c.name);
    const KvGeometry geometry = c.config.kv_geometry();
    int works = 0;
    for (int64_t rest = 1 << 20; rest < int64_t{40} << 30; rest += rest / 7) {
      const int64_t bytes = c.weights_bytes + rest;
      const auto budget = DivideBudget(c.config, c.weights_bytes, bytes, 8192, 8192);
      if (!budget.ok()) continue;
      ++works;
      EXPECT_EQ(budget->budget_bytes, bytes);
      EXPECT_EQ(budget->weights_bytes + budget->ring_bytes + budget->activation_bytes +
                    budget->kv_pool_bytes,
                bytes);
      EXPECT_GE(budget->kv_pool_bytes, budget->tail_bytes_per_sequence);
      EXPECT_EQ(budget->tail_bytes_per_sequence, 256 * geometry.BytesPerToken());
      EXPECT_LE(budget->ring_bytes, kMaxRingBytes);
      EXPECT_EQ(budget->max_tile_bytes, budget->ring_bytes / 4);
      EXPECT_GE(budget->max_tile_bytes,
                geometry.MaxExtentTokens() * geometry.BytesPerTokenPerHead());
      EXPECT_EQ(budget->ring_bytes % (kNumContexts * 256), 0);
      EXPECT_GE(budget->max_chunk_tokens, 64);
      EXPECT_LE(budget->max_chunk_tokens, 8192);
      EXPECT_EQ(budget->max_chunk_tokens & (budget->max_chunk_tokens - 1), 0);
    }
    EXPECT_GT(works, 10);
  }
}

TEST(DivideBudget, ObeysTheChunkLimit) {
  const BudgetCase c = BudgetCases()[0];
  for (const int64_t limit : {1, 64, 100, 512, 100000}) {
    const auto budget =
        DivideBudget(c.config, c.weights_bytes, c.weights_bytes + (8ll << 30), limit, 8192);
    ASSERT_TRUE(budget.ok()) << budget.status();
    EXPECT_LE(budget->max_chunk_tokens, std::max<int64_t>(limit, kMinChunkTokens));
    EXPECT_GT(2 * budget->max_chunk_tokens, std::min(limit, kMaxChunkTokens));
  }
}

// The least budget that the refusal names is enough, and not by more than a MiB.
TEST(DivideBudget, TheLeastThatItNamesWorks) {
  for (const BudgetCase& c : BudgetCases()) {
    SCOPED_TRACE(c.name);
    for (const int64_t context : {512, 8192, 131072}) {
      const auto refused = DivideBudget(c.config, c.weights_bytes, c.weights_bytes, 8192, context);
      ASSERT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
      const std::string message(refused.status().message());
      EXPECT_NE(message.find("--gpu-memory"), std::string::npos) << message;
      const std::string before = "needs at least ";
      const size_t at = message.find(before);
      ASSERT_NE(at, std::string::npos) << message;
      const int64_t least = std::stoll(message.substr(at + before.size())) << 20;
      const auto enough = DivideBudget(c.config, c.weights_bytes, least, 8192, context);
      ASSERT_TRUE(enough.ok()) << enough.status();
      EXPECT_GE(enough->kv_pool_bytes, enough->tail_bytes_per_sequence);
      EXPECT_FALSE(
          DivideBudget(c.config, c.weights_bytes, least - (2 << 20), 8192, context).ok());
    }
  }
}

TEST(DivideBudget, RefusesNonsense) {
  const BudgetCase c = BudgetCases()[2];
  for (const int64_t bytes : {std::numeric_limits<int64_t>::min(), int64_t{-1}, int64_t{0}}) {
    EXPECT_EQ(DivideBudget(c.config, c.weights_bytes, bytes, 8192, 8192).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
}

}  // namespace
}  // namespace headroom
