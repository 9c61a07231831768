// What is bookkeeping and numbers alone: discarded steps, tiling, the pool.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "kernels/wide_shape.h"
#include "services/worker/discarded_steps.h"
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
  // Fewer where a piece of so many does not fit.
  const std::pair<int64_t, int32_t> sizes[] = {{int64_t{32} << 20, 4}, {int64_t{16} << 20, 2}, {int64_t{8} << 20, 1}};
  for (const auto& [max_bytes, heads] : sizes) {
    std::vector<Rectangle> tiles;
    CutIntoTiles(Tiling::kPrefill, 4, geometry, {0, 8, 0, 65536}, max_bytes, tiles);
    EXPECT_EQ(tiles[0].kv_head_end, heads);
  }
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 16, 8, 256}, 8192, 0), 4);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 16, 8, 256}, 8192, 5000), 8);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 32, 8, 128}, 8192, 0), 2);
  EXPECT_EQ(kernels::WideHeadsAtOnce({8192, 32, 8, 128}, 100, 0), 1);
  EXPECT_EQ(kernels::WideHeadsAtOnce({}, 8192, 0), 1);
}

// A layer's window lets its keys begin anywhere: tiles end where attention cuts keys all the same.
TEST(Tiling, PrefillTilesEndWherePiecesDo) {
  const KvGeometry geometry{42, 8, 256};
  std::vector<Rectangle> tiles;
  CutIntoTiles(Tiling::kPrefill, 4, geometry, {0, 8, 4160, 70016}, 64 << 20, tiles);
  ASSERT_EQ(tiles.size(), 10u);
  for (const Rectangle& tile : tiles) {
    EXPECT_TRUE(tile.end_pos % kernels::kWidePieceTokens == 0 || tile.end_pos == 70016) << tile.end_pos;
  }
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

}  // namespace
}  // namespace headroom
