// What a step will take and which share is best: worked out by hand, and against a search over shares.
#include "services/coordinator/placement/step_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace headroom::coordinator {
namespace {

constexpr int kResident = static_cast<int>(Lane::kResident);
constexpr int kFetched = static_cast<int>(Lane::kFetched);
constexpr int kInPlace = static_cast<int>(Lane::kInPlace);

LaneCosts Costs(double base, double fetched, double in_place, double hidden, double overlap) {
  LaneCosts costs;
  costs.base_seconds = base;
  costs.seconds_per_byte[kResident] = 0.5;
  costs.seconds_per_byte[kFetched] = fetched;
  costs.seconds_per_byte[kInPlace] = in_place;
  std::copy_n(costs.seconds_per_byte, 3, costs.busy_seconds_per_byte);
  costs.hidden_base = hidden;
  costs.overlap = overlap;
  return costs;
}

TEST(StepSeconds, AreBaseAndLanes) {
  // One after the other.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 0), {4, 3, 5}), 10 + 2 + 3 + 10);
  // Side by side: the longer of the two.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 1), {4, 3, 5}), 10 + 2 + 10);
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 0.5), {0, 3, 5}), 10 + 5 + 6.5);
  // Copies under the base: only what is longer than it shows.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 1, 1), {0, 8, 0}), 10);
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 1, 1), {0, 18, 0}), 18);
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0.5, 1), {0, 18, 1}), 23);
}

TEST(BestFetchedShare, IsTheBalanceWhereBothRunSideBySide) {
  // f KV / B_fetch = (1 - f) KV / B_in_place + E, with KV 100, rates 1 and 2, E 10: 100 f = 50 - 50 f + 10.
  EXPECT_DOUBLE_EQ(BestFetchedShare(Costs(10, 1, 0.5, 1, 1), 100), 0.4);
  // The figures of a Llama-3-8B step at 128K on an H100: 17.2 GB, 51 GB/s and 104 GB/s, E 8 ms.
  EXPECT_NEAR(BestFetchedShare(Costs(0.008, 1 / 51e9, 1 / 104e9, 1, 1), 17.2e9), 0.36, 0.02);
}

TEST(BestFetchedShare, GoesOneWayWhereTheyTakeTurns) {
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 2, 0, 0), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 2, 1, 0, 0), 100), 0);
  // In place must win by 2% of the step.
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0.99, 0, 0), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0.9, 0, 0), 100), 0);
}

TEST(BestFetchedShare, FetchesWhereNothingIsKnown) {
  EXPECT_EQ(BestFetchedShare(LaneCosts(), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0, 0, 1), 100), 1);  // no store attends
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 1, 0, 1), 0), 1);
}

TEST(BestFetchedShare, IsNotWorseThanAnyOther) {
  for (const double hidden : {0.0, 0.3, 1.0}) {
    for (const double overlap : {0.0, 0.4, 1.0}) {
      for (const double in_place : {0.2, 1.0, 3.0}) {
        for (const double bytes : {1.0, 10.0, 200.0}) {
          const LaneCosts costs = Costs(10, 1, in_place, hidden, overlap);
          const auto seconds = [&](double share) {
            return StepSeconds(costs, {0, share * bytes, (1 - share) * bytes});
          };
          double least = std::numeric_limits<double>::infinity();
          for (int i = 0; i <= 1000; ++i) least = std::min(least, seconds(i / 1000.0));
          EXPECT_LE(seconds(BestFetchedShare(costs, bytes)), least / 0.98 + 1e-9)
              << hidden << " " << overlap << " " << in_place << " " << bytes;
        }
      }
    }
  }
}

TEST(StepModel, FollowsALaneThatSlowsDownAndAsksOnceInAWhile) {
  StepModel model;
  model.Reset(Costs(10, 1, 0.5, 0, 0));
  const LaneBytes bytes = {0, 0, 100};
  // As calibrated: nothing to change, however often.
  for (int i = 0; i < 200; ++i) {
    model.Observe(bytes, {0, 0, 50});
    EXPECT_FALSE(model.WantsAnotherShare(bytes));
  }
  // Four times slower: fetching is better by more than 10%, said once in 64 steps.
  int asked = 0;
  for (int i = 0; i < 128; ++i) {
    model.Observe(bytes, {0, 0, 200});
    asked += model.WantsAnotherShare(bytes) ? 1 : 0;
  }
  EXPECT_EQ(asked, 2);
  EXPECT_NEAR(model.costs().seconds_per_byte[kInPlace], 2, 0.01);
  EXPECT_EQ(BestFetchedShare(model.costs(), 100), 1);
  // One wild measurement does not turn it over.
  model.Reset(Costs(10, 1, 0.5, 0, 0));
  model.Observe(bytes, {0, 0, 1e9});
  EXPECT_LT(model.costs().seconds_per_byte[kInPlace], 1);
}

// ---- Placements

constexpr KvGeometry kFourLayers{4, 8, 64};

SequenceShape Long() {
  SequenceShape shape;
  shape.tokens = 4096;
  for (int64_t pos = 0; pos < 4096; pos += 512) shape.runs.push_back({pos, 512});
  return shape;
}

TEST(PlaceByBudgetAndShare, SharesWhatIsNotResidentByWholeHeadsAndOneCut) {
  const double all = 4 * 8 * 4096.0 * static_cast<double>(kFourLayers.BytesPerTokenPerHead());
  for (const double share : {1.0, 0.9, 0.75, 0.5, 0.3, 0.01, 0.0}) {
    const Placement placement = PlaceByBudget(kFourLayers, 0, share, {Long()});
    const LaneBytes bytes = BytesOfStep(kFourLayers, placement, {Long()});
    EXPECT_EQ(bytes[kResident], 0);
    EXPECT_DOUBLE_EQ(bytes[kFetched] + bytes[kInPlace], all);
    // Within half an extent of one head of each layer.
    EXPECT_NEAR(bytes[kFetched] / all, share, 0.5 / 8 / 8 + 1e-9) << share;
    for (const std::vector<LaneRange>& ranges : placement.layers) {
      for (const LaneRange& range : ranges) {
        if (range.lane == Lane::kInPlace) {
          EXPECT_EQ(range.first_pos, 0) << "the oldest positions";
        }
      }
    }
  }
}

TEST(PlaceByBudgetAndShare, LeavesResidentKeysWhereTheyAre) {
  const int64_t budget = 4 * (3 * 4096 + 1024) * kFourLayers.BytesPerTokenPerHead();
  const LaneBytes fetched =
      BytesOfStep(kFourLayers, PlaceByBudget(kFourLayers, budget, 1.0, {Long()}), {Long()});
  for (const double share : {0.6, 0.0}) {
    const Placement placement = PlaceByBudget(kFourLayers, budget, share, {Long()});
    const LaneBytes bytes = BytesOfStep(kFourLayers, placement, {Long()});
    EXPECT_EQ(bytes[kResident], fetched[kResident]);
    EXPECT_EQ(ResidentBytes(kFourLayers, placement, {Long()}), budget);
    EXPECT_NEAR(bytes[kFetched] / fetched[kFetched], share, 0.02);
  }
}

}  // namespace
}  // namespace headroom::coordinator
