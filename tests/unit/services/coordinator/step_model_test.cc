// What a step will take and which share is best: worked out by hand, and against a search over shares.
#include "services/coordinator/placement/step_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace headroom::coordinator {
namespace {

constexpr int kResident = static_cast<int>(Lane::kResident);
constexpr int kFetched = static_cast<int>(Lane::kFetched);
constexpr int kInPlace = static_cast<int>(Lane::kInPlace);

// With slowdowns of 1 and 1 the lanes run side by side, with 2 and 2 in turns.
LaneCosts Costs(double base, double fetched, double in_place, double hidden,
                double fetched_slowdown, double in_place_slowdown) {
  LaneCosts costs;
  costs.base_seconds = base;
  costs.seconds_per_byte[kResident] = 0.5;
  costs.seconds_per_byte[kFetched] = fetched;
  costs.seconds_per_byte[kInPlace] = in_place;
  std::copy_n(costs.seconds_per_byte, 3, costs.busy_seconds_per_byte);
  costs.hidden_base = hidden;
  costs.fetched_slowdown = fetched_slowdown;
  costs.in_place_slowdown = in_place_slowdown;
  return costs;
}

TEST(StepSeconds, AreBaseAndLanes) {
  // One after the other.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 2, 2), {4, 3, 5}), 10 + 2 + 3 + 10);
  // Side by side: the longer of the two.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 1, 1), {4, 3, 5}), 10 + 2 + 10);
  // Until the copies have ended, after 3 x 1.5, keys in place get two thirds of their rate: 3 are done.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 1.5, 1.5), {0, 3, 5}), 10 + 4.5 + (10 - 3));
  // Keys in place end after 4 x 1.25 and lost a fifth; until then 5 / 2 of 12 were copied.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0, 2, 1.25), {0, 12, 2}), 10 + 5 + (12 - 2.5));
  // Copies under the base: only what is longer than it shows.
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 1, 1, 1), {0, 8, 0}), 10);
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 1, 1, 1), {0, 18, 0}), 18);
  EXPECT_DOUBLE_EQ(StepSeconds(Costs(10, 1, 2, 0.5, 1, 1), {0, 18, 1}), 23);
  // Where all is resident the base is another, if it is known.
  LaneCosts resident = Costs(10, 1, 2, 0, 1, 1);
  EXPECT_DOUBLE_EQ(StepSeconds(resident, {4, 0, 0}), 10 + 2);
  resident.resident_base_seconds = 7;
  EXPECT_DOUBLE_EQ(StepSeconds(resident, {4, 0, 0}), 7 + 2);
  EXPECT_DOUBLE_EQ(StepSeconds(resident, {4, 3, 0}), 10 + 2 + 3);
  EXPECT_DOUBLE_EQ(StepSeconds(resident, {4, 0, 5}), 10 + 2 + 10);
  // What keys in place cost by themselves is there once, and copies run on in it.
  LaneCosts costs = Costs(10, 1, 2, 0, 2, 2);
  costs.in_place_seconds = 4;
  EXPECT_DOUBLE_EQ(StepSeconds(costs, {0, 6, 0}), 10 + 6);
  EXPECT_DOUBLE_EQ(StepSeconds(costs, {0, 6, 1}), 10 + 4 + 2 + 2);
}

TEST(BusySeconds, AreThoseOfEachAndWhatTheyLoseToEachOther) {
  LaneCosts costs = Costs(10, 1, 2, 0.5, 2, 1.25);
  costs.in_place_seconds = 3;
  // 20 copied, 8 of them under base and start. In place 2 x 1.25 x 4 = 10: copies lose half of that.
  const LaneValues busy = BusySeconds(costs, {6, 20, 4});
  EXPECT_DOUBLE_EQ(busy[kResident], 3);
  EXPECT_DOUBLE_EQ(busy[kFetched], 20 + 5);
  EXPECT_DOUBLE_EQ(busy[kInPlace], 3 + 8 + 2);
  EXPECT_DOUBLE_EQ(StepSeconds(costs, {6, 20, 4}), 10 + 3 + 3 + (12 + 5));
}

TEST(Slower, EverythingTakesLonger) {
  LaneCosts costs = Costs(10, 1, 2, 0.5, 2, 1.25);
  costs.in_place_seconds = 3;
  costs.resident_base_seconds = 7;
  const LaneCosts slower = Slower(costs, 1.5);
  for (const LaneValues& bytes :
       {LaneValues{6, 20, 4}, LaneValues{0, 3, 0}, LaneValues{1, 0, 7}, LaneValues{6, 0, 0}}) {
    EXPECT_DOUBLE_EQ(StepSeconds(slower, bytes), 1.5 * StepSeconds(costs, bytes));
    const LaneValues before = BusySeconds(costs, bytes), after = BusySeconds(slower, bytes);
    for (size_t lane = 0; lane < before.size(); ++lane) {
      EXPECT_NEAR(after[lane], 1.5 * before[lane], 1e-12) << lane;
    }
  }
}

TEST(BestFetchedShare, IsTheBalanceWhereBothRunSideBySide) {
  // f KV / B_fetch = (1 - f) KV / B_in_place + E, with KV 100, rates 1 and 2, E 10: 100 f = 50 - 50 f + 10.
  EXPECT_DOUBLE_EQ(BestFetchedShare(Costs(10, 1, 0.5, 1, 1, 1), 100), 0.4);
  // The figures of a Llama-3-8B step at 128K on an H100: 17.2 GB, 51 GB/s and 104 GB/s, E 8 ms.
  EXPECT_NEAR(BestFetchedShare(Costs(0.008, 1 / 51e9, 1 / 104e9, 1, 1, 1), 17.2e9), 0.36, 0.02);
  // Where copies lose a fifth of their rate to the threads, and those nothing: 125 f - 12.5 = 50 - 50 f.
  EXPECT_DOUBLE_EQ(BestFetchedShare(Costs(10, 1, 0.5, 1, 1.25, 1), 100), 62.5 / 175);
}

TEST(BestFetchedShare, GoesOneWayWhereTheyTakeTurns) {
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 2, 0, 2, 2), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 2, 1, 0, 2, 2), 100), 0);
  // In place must win by 2% of the step.
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0.99, 0, 2, 2), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0.9, 0, 2, 2), 100), 0);
}

TEST(BestFetchedShare, FetchesWhereNothingIsKnown) {
  EXPECT_EQ(BestFetchedShare(LaneCosts(), 100), 1);
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 0, 0, 1, 1), 100), 1);  // no store attends
  EXPECT_EQ(BestFetchedShare(Costs(10, 1, 1, 0, 1, 1), 0), 1);
}

TEST(BestFetchedShare, IsNotWorseThanAnyOther) {
  for (const double hidden : {0.0, 0.3, 1.0}) {
    for (const auto& [fetched_slowdown, in_place_slowdown] :
         {std::pair(2.0, 2.0), std::pair(1.6, 1.6), std::pair(1.3, 1.0), std::pair(1.0, 1.0)}) {
      for (const double in_place : {0.2, 1.0, 3.0}) {
        for (const double bytes : {1.0, 10.0, 200.0}) {
          LaneCosts costs =
              Costs(10, 1, in_place, hidden, fetched_slowdown, in_place_slowdown);
          costs.in_place_seconds = hidden;
          const auto seconds = [&](double share) {
            return StepSeconds(costs, {0, share * bytes, (1 - share) * bytes});
          };
          double least = std::numeric_limits<double>::infinity();
          for (int i = 0; i <= 1000; ++i) least = std::min(least, seconds(i / 1000.0));
          EXPECT_LE(seconds(BestFetchedShare(costs, bytes)), least / 0.98 + 1e-9)
              << hidden << " " << fetched_slowdown << " " << in_place << " " << bytes;
        }
      }
    }
  }
}

TEST(StepModel, FollowsALaneThatSlowsDownAndAsksOnceInAWhile) {
  StepModel model;
  model.Reset(Costs(10, 1, 0.5, 0, 2, 2));
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
  model.Reset(Costs(10, 1, 0.5, 0, 2, 2));
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
