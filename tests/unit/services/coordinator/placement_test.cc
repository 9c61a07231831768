#include "services/coordinator/placement/placement.h"

#include <gtest/gtest.h>

#include <vector>

#include "services/coordinator/placement/predict.h"
#include "services/coordinator/placement/step_model.h"

namespace headroom::coordinator {
namespace {

constexpr KvGeometry kGeometry = {/*num_layers=*/4, /*num_kv_heads=*/3, /*head_dim=*/64};
constexpr int64_t kHeadToken = 2 * 64 * 2;  // bytes of one token of one head

// Runs of 64, 64, 128, 256, 512 tokens: 1,024 positions.
SequenceShape Doubling(int64_t tokens = 1000) {
  return {{{0, 64}, {64, 64}, {128, 128}, {256, 256}, {512, 512}}, tokens};
}

PlacementSpec Shares(double resident, double fetched, double in_place = 0) {
  PlacementSpec spec;
  spec.automatic = false;
  spec.shares = {resident, fetched, in_place};
  return spec;
}

// Every head and position of every layer has exactly one range.
void ExpectCoversAll(const KvGeometry& geometry, const Placement& placement) {
  ASSERT_EQ(placement.layers.size(), static_cast<size_t>(geometry.num_layers));
  for (const auto& ranges : placement.layers) {
    for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
      int64_t next = 0;
      for (const LaneRange& range : ranges) {
        if (head < range.kv_head_begin || head >= range.kv_head_end) continue;
        EXPECT_EQ(range.first_pos, next) << "head " << head;
        EXPECT_GT(range.end_pos, range.first_pos);
        next = range.end_pos;
      }
      EXPECT_EQ(next, kNoEnd) << "head " << head;
    }
  }
}

TEST(ParsePlacement, KnowsAutoLanesAndShares) {
  EXPECT_TRUE(ParsePlacement("auto")->automatic);
  EXPECT_EQ(*ParsePlacement("resident"), Shares(1, 0));
  EXPECT_EQ(*ParsePlacement("in-place"), Shares(0, 0, 1));
  EXPECT_EQ(*ParsePlacement("resident=0.5,fetched=0.5"), Shares(0.5, 0.5));
  EXPECT_EQ(*ParsePlacement("in-place=0.25,resident=0.75"), Shares(0.75, 0, 0.25));
}

TEST(ParsePlacement, RefusesWhatIsNoPlacement) {
  for (const char* text :
       {"", "gpu", "resident=", "resident=0.5", "resident=0.5,fetched=0.6", "resident=1,resident=0",
        "resident=nan,fetched=1", "fetched=-1,resident=2", "resident=1,", "auto,resident=1"}) {
    EXPECT_EQ(ParsePlacement(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(PlaceByShares, WholeHeadsNeedNoCut) {
  const Placement placement = PlaceByShares(kGeometry, Shares(1.0 / 3, 2.0 / 3), {Doubling()});
  ExpectCoversAll(kGeometry, placement);
  const std::vector<LaneRange> expected = {{Lane::kResident, 0, 1, 0, kNoEnd},
                                           {Lane::kFetched, 1, 3, 0, kNoEnd}};
  for (const auto& ranges : placement.layers) EXPECT_EQ(ranges, expected);
}

TEST(PlaceByShares, ARemainderCutsOneHeadAtTheNearestBorder) {
  // Half of three heads: one whole, of the second the newer half of 1,000 tokens, which begins
  // nearest at 512.
  const Placement placement = PlaceByShares(kGeometry, Shares(0.5, 0.5), {Doubling()});
  ExpectCoversAll(kGeometry, placement);
  const std::vector<LaneRange> expected = {{Lane::kResident, 0, 1, 0, kNoEnd},
                                           {Lane::kFetched, 1, 2, 0, 512},
                                           {Lane::kResident, 1, 2, 512, kNoEnd},
                                           {Lane::kFetched, 2, 3, 0, kNoEnd}};
  EXPECT_EQ(placement.layers[0], expected);
}

TEST(PlaceByShares, ThreeLanesInOneHeadLieFromInPlaceToResident) {
  const KvGeometry one_head = {1, 1, 64};
  const Placement placement = PlaceByShares(one_head, Shares(0.5, 0.25, 0.25), {Doubling()});
  ExpectCoversAll(one_head, placement);
  const std::vector<LaneRange> expected = {{Lane::kInPlace, 0, 1, 0, 256},
                                           {Lane::kFetched, 0, 1, 256, 512},
                                           {Lane::kResident, 0, 1, 512, kNoEnd}};
  EXPECT_EQ(placement.layers[0], expected);
}

TEST(PlaceByShares, CoversAllForAnyShares) {
  for (int resident = 0; resident <= 20; ++resident) {
    for (int fetched = 0; resident + fetched <= 20; ++fetched) {
      const PlacementSpec spec =
          Shares(resident / 20.0, fetched / 20.0, (20 - resident - fetched) / 20.0);
      ExpectCoversAll(kGeometry, PlaceByShares(kGeometry, spec, {Doubling(), Doubling(300)}));
      ExpectCoversAll(kGeometry, PlaceByShares(kGeometry, spec, {{{{0, 64}}, 5}}));
      ExpectCoversAll(kGeometry, PlaceByShares(kGeometry, spec, {}));
    }
  }
}

TEST(PlaceByBudget, NothingFitsIntoNothing) {
  for (const int64_t budget : {int64_t{-5}, int64_t{0}, 64 * kHeadToken - 1}) {
    const Placement placement = PlaceByBudget(kGeometry, budget, 1.0, {Doubling()});
    ExpectCoversAll(kGeometry, placement);
    EXPECT_EQ(ResidentBytes(kGeometry, placement, {Doubling()}), 0);
  }
}

TEST(PlaceByBudget, EverythingResidentWhereItFits) {
  const int64_t all = 1024 * kGeometry.BytesPerToken();
  EXPECT_EQ(PlaceByBudget(kGeometry, all, 1.0, {Doubling()}),
            PlaceByShares(kGeometry, Shares(1, 0), {Doubling()}));
  EXPECT_NE(PlaceByBudget(kGeometry, all - 1, 1.0, {Doubling()}),
            PlaceByShares(kGeometry, Shares(1, 0), {Doubling()}));
}

TEST(PlaceByBudget, TakesAllThatFitsAndNeverMore) {
  const std::vector<SequenceShape> sequences = {Doubling(), {{{0, 512}, {512, 512}}, 700}};
  const int64_t largest_run = 2 * 512 * kHeadToken;  // both sequences have one from position 512 on
  for (int64_t budget = 0; budget <= 2048 * kGeometry.BytesPerToken(); budget += 7777) {
    const Placement placement = PlaceByBudget(kGeometry, budget, 1.0, sequences);
    ExpectCoversAll(kGeometry, placement);
    const int64_t used = ResidentBytes(kGeometry, placement, sequences);
    EXPECT_LE(used, budget);
    EXPECT_GT(used, budget - largest_run) << "one more run of one head would have fitted";
  }
}

TEST(PlaceByBudget, TheOldestPositionsLeaveFirst) {
  // Room for the newest 512 tokens of one head in each layer.
  const Placement placement = PlaceByBudget(kGeometry, 4 * 512 * kHeadToken, 1.0, {Doubling()});
  for (int32_t layer = 0; layer < kGeometry.num_layers; ++layer) {
    EXPECT_EQ(placement.LaneOf(layer, 0, 512), Lane::kResident);
    EXPECT_EQ(placement.LaneOf(layer, 0, 256), Lane::kFetched);
    EXPECT_EQ(placement.LaneOf(layer, 1, 512), Lane::kFetched);
  }
}

TEST(PlaceByBudget, LayersDifferByOneBorderAtMost) {
  // One run more than even: 512 tokens in each layer and 256 in one.
  const Placement placement = PlaceByBudget(kGeometry, (4 * 512 + 256) * kHeadToken, 1.0, {Doubling()});
  EXPECT_EQ(placement.LaneOf(0, 0, 256), Lane::kResident);
  for (int32_t layer = 1; layer < kGeometry.num_layers; ++layer) {
    EXPECT_EQ(placement.LaneOf(layer, 0, 256), Lane::kFetched);
    EXPECT_EQ(placement.LaneOf(layer, 0, 512), Lane::kResident);
  }
}

TEST(Predict, CountsTheBytesOfADecodeStepByLane) {
  PredictInput input;
  input.extents = {kGeometry};
  input.spec = Shares(1.0 / 3, 2.0 / 3);
  input.prompt_tokens = 1000;
  input.max_tokens = 24;
  input.pool_bytes = int64_t{1} << 30;
  input.tail_bytes_per_sequence = 256 * kGeometry.BytesPerToken();
  input.host_capacity_bytes = int64_t{1} << 30;
  const Prediction prediction = Predict(input);
  EXPECT_TRUE(prediction.does_not_fit.empty());
  // 960 of 1,000 tokens are sealed.
  EXPECT_EQ(prediction.lanes[0].bytes, 960 * kHeadToken * 1 * kGeometry.num_layers);
  EXPECT_EQ(prediction.lanes[1].bytes, 960 * kHeadToken * 2 * kGeometry.num_layers);
  EXPECT_EQ(prediction.lanes[2].bytes, 0);
  EXPECT_NEAR(prediction.lanes[0].kv_heads, 1, 1e-9);
  EXPECT_NEAR(prediction.lanes[1].kv_heads, 2, 1e-9);
  EXPECT_EQ(prediction.host_bytes, 1024 * kGeometry.BytesPerToken());
}

TEST(Predict, HostMemoryIsOfWhatWindowsReach) {
  PredictInput input;
  input.extents = {kGeometry, {256, 0, 256, 0}, /*max_chunk_tokens=*/64};
  input.num_sequences = 2;
  input.prompt_tokens = 10240;
  input.host_capacity_bytes = int64_t{1} << 40;
  // Two layers of all tokens, two of the window, what is on the way and three extents of 256.
  EXPECT_EQ(Predict(input).host_bytes,
            2 * (2 * 10240 + 2 * (256 + 128 + 704 + 3 * 256)) * kGeometry.BytesPerTokenPerLayer());
}

TEST(Predict, SaysWhatDoesNotFit) {
  PredictInput input;
  input.extents = {kGeometry};
  input.spec = Shares(1, 0);
  input.prompt_tokens = 1000;
  input.pool_bytes = 300 * kGeometry.BytesPerToken();
  input.tail_bytes_per_sequence = 256 * kGeometry.BytesPerToken();
  input.host_capacity_bytes = 900 * kGeometry.BytesPerToken();
  EXPECT_EQ(Predict(input).does_not_fit.size(), 2u);
  input.spec = PlacementSpec();  // auto takes what there is
  EXPECT_EQ(Predict(input).does_not_fit.size(), 1u);
  input.num_sequences = 2;
  input.host_capacity_bytes = int64_t{1} << 40;
  EXPECT_EQ(Predict(input).does_not_fit.size(), 1u) << "two tails are more than the pool";
}

TEST(ForeseenShape, RunsFollowEachOtherUpToTheTokens) {
  for (const int64_t tokens : {1, 63, 64, 65, 1000, 7000, 100000}) {
    for (const int64_t prompt : {int64_t{1}, tokens / 2, tokens}) {
      int64_t next = 0;
      for (const RunShape& run : ForeseenShape({kGeometry}, prompt, tokens).runs) {
        EXPECT_EQ(run.first_pos, next);
        next += run.capacity_tokens;
      }
      EXPECT_GE(next, FloorToBlock(tokens));
      EXPECT_LE(next, std::max<int64_t>(2 * tokens, 64));
    }
  }
}

// ---- Windows -------------------------------------------------------------------------------------

// Layers 0 and 2 see 1,000 tokens, 1 and 3 all; runs of 1,024.
const LayerWindows kWindows = {1000, 0, 1000, 0};
constexpr KvGeometry kWindowGeometry = {4, 2, 64};

std::vector<SequenceShape> TenRuns() {
  SequenceShape shape;
  for (int64_t run = 0; run < 10; ++run) shape.runs.push_back({run * 1024, 1024});
  shape.tokens = 10240;
  return {shape};
}

TEST(Windows, TheFirstKeyIsTheBlockThatTheNextQuerySees) {
  EXPECT_EQ(FirstKey(kWindows, 0, 999), 0);
  EXPECT_EQ(FirstKey(kWindows, 0, 1062), 0);   // the query at 1062 sees 63 and on
  EXPECT_EQ(FirstKey(kWindows, 0, 1063), 64);
  EXPECT_EQ(FirstKey(kWindows, 1, 5000), 0);
  EXPECT_EQ(FirstKey({}, 0, 5000), 0);
}

TEST(Windows, NothingBehindThemIsCounted) {
  const int64_t a_head = 1024 * kWindowGeometry.BytesPerTokenPerHead();  // of a run
  PlacementSpec all_resident;
  all_resident.automatic = false;
  all_resident.shares = {1, 0, 0};
  const Placement placement = PlaceByShares(kWindowGeometry, all_resident, TenRuns());
  EXPECT_EQ(ResidentBytes(kWindowGeometry, placement, TenRuns()), 4 * 2 * 10 * a_head);
  // The query at 10,240 sees 9,241 and on, which lies in the last run.
  EXPECT_EQ(ResidentBytes(kWindowGeometry, placement, TenRuns(), kWindows),
            2 * 2 * 10 * a_head + 2 * 2 * 1 * a_head);
  const LaneBytes bytes = BytesOfStep(kWindowGeometry, placement, TenRuns(), kWindows);
  const int64_t seen = 10240 - FirstKey(kWindows, 0, 10240);
  EXPECT_EQ(bytes[static_cast<int>(Lane::kResident)],
            static_cast<double>((2 * 2 * 10240 + 2 * 2 * seen) *
                                kWindowGeometry.BytesPerTokenPerHead()));
}

// Layers with a window come first: what they hold does not grow.
TEST(Windows, ABudgetGoesToLayersWithAWindowFirst) {
  const int64_t a_head = 1024 * kWindowGeometry.BytesPerTokenPerHead();
  const auto resident = [&](const Placement& placement, int32_t layer) {
    Placement one;
    one.layers.assign(4, {});
    one.layers[layer] = placement.layers[layer];
    return ResidentBytes(kWindowGeometry, one, TenRuns(), kWindows);
  };
  const Placement placement =
      PlaceByBudget(kWindowGeometry, 24 * a_head, /*fetched_share=*/1.0, TenRuns(), kWindows);
  EXPECT_EQ(resident(placement, 0), 2 * a_head);
  EXPECT_EQ(resident(placement, 2), 2 * a_head);
  EXPECT_EQ(resident(placement, 1), 10 * a_head);
  EXPECT_EQ(resident(placement, 3), 10 * a_head);
  EXPECT_LE(ResidentBytes(kWindowGeometry, placement, TenRuns(), kWindows), 24 * a_head);
  // With no memory for any, half of what is read goes in place: of windows too.
  const Placement shared =
      PlaceByBudget(kWindowGeometry, 0, /*fetched_share=*/0.5, TenRuns(), kWindows);
  EXPECT_EQ(shared.LaneOf(0, 0, 9216), Lane::kFetched);
  EXPECT_EQ(shared.LaneOf(0, 1, 9216), Lane::kInPlace);
  EXPECT_EQ(shared.LaneOf(1, 1, 0), Lane::kInPlace);
}

}  // namespace
}  // namespace headroom::coordinator
