// The same tokens and log-probabilities, to the bit, however a sequence is computed: wherever its keys
// lie, however its prompt is cut, whatever runs beside it. Two ways that differ in a bit mean that a
// key was read before it was there, or after it was overwritten.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tests/common/worker_harness.h"
#include "tests/unit/services/worker/executor_test_util.h"

namespace headroom {
namespace {

class Exactness : public ExecutorTest {
 protected:
  void Start(const RandomModelSpec& spec, const WorkerHarnessOptions& options = {}) {
    StartHarness(spec, options);
    PreparePlans();
  }
  void Restart(const WorkerHarnessOptions& options) {
    RestartHarness(options);
    PreparePlans();
  }
  void PreparePlans() {
    if (harness_ == nullptr) return;  // told
    Prepare(ResidentPlan(kResident, harness_->geometry()));
    Prepare(FetchedPlan(kFetched, harness_->geometry()));
    Prepare(WholeHeadPlan(kMixed, harness_->geometry(), [](int32_t layer, int32_t head) {
      return (layer + head) % 2 == 0 ? Lane::kResident : Lane::kFetched;
    }));
  }
};

TEST_F(Exactness, ResidentIsFetched) {
  Start(SmallModel());
  TestRequest request = Request(1, 400, Either(20, 4));
  request.max_run_tokens = 128;
  const TestOutput resident = Run(request, kResident);
  ASSERT_EQ(resident.scored.size(), 399u);
  ASSERT_EQ(resident.drawn.size(), static_cast<size_t>(request.num_draws));
  EXPECT_EQ(Difference(resident, Run(request, kFetched)), "");
  EXPECT_EQ(Difference(resident, Run(request, kMixed)), "");
}

// Every division of three heads on each of two layers.
TEST_F(Exactness, EveryWholeHeadMix) {
  RandomModelSpec spec = SmallModel();
  spec.num_layers = 2;
  Start(spec);
  TestRequest request = Request(2, Either(200, 140), Either(8, 2));
  request.max_run_tokens = 64;
  request.chunk_tokens = 72;
  const TestOutput resident = Run(request, kResident);
  for (uint64_t mask = 0; mask < 64; mask += Either(1, 23)) {
    const uint64_t version = 100 + mask;
    Prepare(WholeHeadPlan(version, harness_->geometry(), [&](int32_t layer, int32_t head) {
      return mask >> (3 * layer + head) & 1 ? Lane::kResident : Lane::kFetched;
    }));
    ASSERT_EQ(Difference(resident, Run(request, version)), "") << "heads " << mask;
  }
}

TEST_F(Exactness, KeysThatTheTailHoldsNeedNoLane) {
  Start(SmallModel());
  TestRequest request = Request(3, 170, Either(60, 5));
  request.max_run_tokens = 64;
  for (const int64_t chunk : Either<int64_t>({1, 50, 1000}, {50})) {
    request.chunk_tokens = chunk;
    const TestOutput in_tail = Run(request, kFetched, SealedRule::kLeast);
    for (const StepRecord& step : harness_->steps()) {
      ASSERT_EQ(step.result.lanes[static_cast<int>(Lane::kFetched)].bytes, 0);
    }
    EXPECT_EQ(Difference(in_tail, Run(request, kFetched, SealedRule::kAtOnce)), "") << chunk;
    EXPECT_EQ(Difference(in_tail, Run(request, kResident, SealedRule::kAtOnce)), "") << chunk;
    EXPECT_EQ(Difference(in_tail, Run(request, kMixed, SealedRule::kCoordinator)), "") << chunk;
  }
}

TEST_F(Exactness, TheChunksOfAPromptDoNotShow) {
  Start(SmallModel());
  TestRequest request = Request(4, Either(700, 330), Either(5, 2));
  request.max_run_tokens = 256;
  const TestOutput whole = Run(request, kResident);
  for (const int64_t chunk : Either<int64_t>({1, 7, 64, 65, 255, 300}, {65, 300})) {
    request.chunk_tokens = chunk;
    for (const uint64_t plan : {kResident, kFetched, kMixed}) {
      for (const SealedRule rule :
           {SealedRule::kCoordinator, SealedRule::kAtOnce, SealedRule::kLeast}) {
        if (!kThoroughly && (plan == kResident || rule != SealedRule::kAtOnce)) continue;
        ASSERT_EQ(Difference(whole, Run(request, plan, rule)), "")
            << "chunks of " << chunk << ", plan " << plan << ", rule " << static_cast<int>(rule);
      }
    }
  }
}

// A chunk of a key more than the tail holds does not lie in it.
TEST_F(Exactness, AChunkMayBeAKeyLongerThanTheTail) {
  Start(SmallModel());
  for (const int64_t length : {kTailTokens, kTailTokens + 1}) {
    TestRequest request = Request(5, length, 2);
    request.chunk_tokens = length;
    const TestOutput whole = Run(request, kResident);
    request.chunk_tokens = 100;
    EXPECT_EQ(Difference(whole, Run(request, kResident)), "") << length;
  }
}

TEST_F(Exactness, OtherSequencesOfTheBatchDoNotShow) {
  Start(SmallModel());
  const std::vector<TestRequest> requests = RaggedRequests(150);
  std::vector<TestOutput> alone;
  for (const TestRequest& request : requests) alone.push_back(Run(request, kResident));
  for (const uint64_t plan : Either<uint64_t>({kResident, kFetched, kMixed}, {kMixed})) {
    for (const bool chunks_together : {false, true}) {
      harness_->set_segment_used(0);
      RunOptions options;
      options.plan_version = plan;
      options.chunks_together = chunks_together;
      const auto together = harness_->Run(requests, options);
      ASSERT_TRUE(together.ok()) << together.status();
      for (int i = 0; i < 5; ++i) {
        EXPECT_EQ(Difference(alone[i], (*together)[i]), "")
            << "sequence " << i << ", plan " << plan << ", together " << chunks_together;
      }
    }
  }
}

TEST_F(Exactness, ThreadsDoNotShow) {
  Start(SmallModel());
  TestRequest request = Request(20, 450, Either(10, 2));
  request.max_run_tokens = 128;
  const TestOutput one = Run(request, kFetched);
  WorkerHarnessOptions options;
  options.compute_threads = 2;
  Restart(options);
  EXPECT_EQ(Difference(one, Run(request, kFetched)), "");
  EXPECT_EQ(Difference(one, Run(request, kResident)), "");
}

TEST_F(Exactness, AHeadMayBeSplitAtAnExtentBorder) {
  Start(SmallModel());
  TestRequest request = Request(30, 390, Either(40, 2));
  request.max_run_tokens = 128;
  request.chunk_tokens = 200;
  const TestOutput resident = Run(request, kResident);
  uint64_t version = 200;
  for (const int64_t border : Either<int64_t>({64, 128, 256, 384}, {128})) {
    for (const Lane below : {Lane::kResident, Lane::kFetched}) {
      const Lane above = below == Lane::kResident ? Lane::kFetched : Lane::kResident;
      for (int32_t head = 0; head < Either(3, 1); ++head) {
        Prepare(SplitHeadPlan(++version, harness_->geometry(), head, border, below, above));
        ASSERT_EQ(Difference(resident, Run(request, version)), "")
            << "head " << head << " at " << border << ", below " << static_cast<int>(below);
      }
    }
  }
}

TEST_F(Exactness, DecodeBesideAPrefillIsDecodeAlone) {
  Start(SmallModel());
  std::vector<TestRequest> requests = {Request(40, Either(300, 130), Either(40, 12)),
                                       Request(41, Either(900, 400), 3)};
  requests[0].max_run_tokens = 64;
  requests[1].max_run_tokens = 256;
  requests[1].chunk_tokens = 300;
  const TestOutput first = Run(requests[0], kResident);
  const TestOutput second = Run(requests[1], kResident);
  for (const uint64_t plan : Either<uint64_t>({kResident, kFetched, kMixed}, {kMixed})) {
    harness_->set_segment_used(0);
    RunOptions options;
    options.plan_version = plan;
    options.first_draws_alone = 3;
    const auto both = harness_->Run(requests, options);
    ASSERT_TRUE(both.ok()) << both.status();
    EXPECT_EQ(Difference(first, (*both)[0]), "") << plan;
    EXPECT_EQ(Difference(second, (*both)[1]), "") << plan;
  }
}

// Copies are made, filled and dropped between the steps of sequences that are being computed.
TEST_F(Exactness, ThePlanMayChangeWithEveryStep) {
  Start(SmallModel());
  std::vector<TestRequest> requests = {Request(60, Either(280, 130), Either(50, 12)),
                                       Request(61, Either(500, 200), Either(20, 3))};
  std::vector<TestOutput> alone;
  for (TestRequest& request : requests) {
    request.max_run_tokens = 64;
    request.chunk_tokens = 130;
    alone.push_back(Run(request, kResident));
  }
  for (const std::vector<uint64_t>& cycle : Either<std::vector<uint64_t>>(
           {{kResident, kFetched}, {kFetched, kMixed, kResident},
            {kMixed, kMixed, kFetched, kResident, kResident}},
           {{kFetched, kMixed, kResident}})) {
    harness_->set_segment_used(0);
    RunOptions options;
    options.plan_cycle = cycle;
    const auto both = harness_->Run(requests, options);
    ASSERT_TRUE(both.ok()) << both.status();
    EXPECT_EQ(Difference(alone[0], (*both)[0]), "");
    EXPECT_EQ(Difference(alone[1], (*both)[1]), "");
  }
}

// What a coordinator's corrections may come to, for as long as it lasts: another plan every eight steps,
// while keys come late. On a GPU ten thousand tokens.
TEST_F(Exactness, ManyTokensWhilePlansChangeAndKeysComeLate) {
  WorkerHarnessOptions options;
  options.max_context_tokens = 16384;
  options.segment_bytes = int64_t{64} << 20;
  if (OnGpu()) options.budget_bytes = int64_t{256} << 20;
  Start(SmallModel(), options);
  TestRequest request = Request(64, 330, OnGpu() ? 10'000 : Either(26, 10));
  request.chunk_tokens = 130;
  request.max_run_tokens = OnGpu() ? 1024 : 64;
  request.temperature = 0.7f;  // a bit that differs becomes another text
  request.seed = 3;
  const TestOutput resident = Run(request, kResident);
  ASSERT_EQ(resident.drawn.size(), static_cast<size_t>(request.num_draws));

  // The CPU device delays what computes, too: there copies must not be able to run ahead.
  if (!OnGpu()) {
    options.ring_bytes =
        kNumContexts * 2 * 3 * kBlockTokens * harness_->geometry().BytesPerTokenPerHead();
  }
  options.delay_seed = 11;
  Restart(options);
  constexpr uint64_t kOtherHeads = 101;
  Prepare(WholeHeadPlan(kOtherHeads, harness_->geometry(), [](int32_t layer, int32_t head) {
    return (layer + head) % 3 == 0 ? Lane::kFetched : Lane::kResident;
  }));
  RunOptions run;
  for (const uint64_t plan : {kFetched, kMixed, kResident, kOtherHeads, kMixed, kFetched}) {
    run.plan_cycle.insert(run.plan_cycle.end(), Either(8, 4), plan);
  }
  EXPECT_EQ(Difference(resident, Run(request, run)), "");
}

// The pool holds the copies of one head: with every step another head's take their place, while the
// step before may still read them.
TEST_F(Exactness, CopiesMayTakeThePlaceOfOthersWithEveryStep) {
  const RandomModelSpec spec = SmallModel();
  const KvGeometry geometry{static_cast<int32_t>(spec.num_layers),
                            static_cast<int32_t>(spec.num_kv_heads),
                            static_cast<int32_t>(spec.head_dim)};
  constexpr int64_t kSealed = 256;
  WorkerHarnessOptions options;
  options.kv_pool_bytes = kTailTokens * geometry.BytesPerToken() +
                          kSealed * geometry.num_layers * geometry.BytesPerTokenPerHead();
  Start(spec, options);
  TestRequest request = Request(62, kSealed + 30, Either(20, 8));
  request.max_run_tokens = 128;
  RunOptions run;
  run.sealed = SealedRule::kAtOnce;
  for (int32_t resident = 0; resident < geometry.num_kv_heads; ++resident) {
    run.plan_cycle.push_back(100 + resident);
    Prepare(WholeHeadPlan(100 + resident, geometry, [&](int32_t, int32_t head) {
      return head == resident ? Lane::kResident : Lane::kFetched;
    }));
  }
  const TestOutput fetched = Run(request, kFetched);
  EXPECT_EQ(Difference(fetched, Run(request, run)), "");
  const LaneAccount& copies =
      harness_->steps().back().result.lanes[static_cast<int>(Lane::kResident)];
  EXPECT_NEAR(copies.kv_heads, 1, 1e-9);
}

// Tiles so small that the ring wraps many times a layer; in the decode tiling and the prefill one.
TEST_F(Exactness, LengthsAroundBordersInARingThatWraps) {
  Start(SmallModel());
  const int64_t head_block = kBlockTokens * harness_->geometry().BytesPerTokenPerHead();
  std::vector<TestOutput> whole;
  const std::vector<int64_t> lengths =
      Either<int64_t>({63, 64, 65, 255, 256, 257, 1000}, {65, 257});
  for (const int64_t length : lengths) whole.push_back(Run(Request(length, length, 6), kResident));
  for (const int64_t blocks : Either<int64_t>({1, 3, 5, 12}, {1, 3})) {
    WorkerHarnessOptions options;
    options.ring_bytes = kNumContexts * 2 * blocks * head_block;
    Restart(options);
    for (size_t i = 0; i < lengths.size(); ++i) {
      TestRequest request = Request(lengths[i], lengths[i], 6);
      request.max_run_tokens = blocks == 3 ? 64 : 512;
      request.chunk_tokens = blocks == 5 ? 1000 : 333;
      ASSERT_EQ(Difference(whole[i], Run(request, kFetched, SealedRule::kAtOnce)), "")
          << lengths[i] << " tokens, tiles of " << blocks << " blocks";
      ASSERT_EQ(Difference(whole[i], Run(request, kMixed)), "")
          << lengths[i] << " tokens, tiles of " << blocks << " blocks";
    }
  }
}

TEST_F(Exactness, EveryGroupAndHeadSize) {
  for (const int64_t group : {1, 2, 3, 4, 5, 8}) {
    for (const int64_t head_dim : {64, 128}) {
      if (!kThoroughly && group != 3) continue;
      RandomModelSpec spec = SmallModel();
      spec.num_layers = 2;
      spec.num_kv_heads = 2;
      spec.num_q_heads = 2 * group;
      spec.head_dim = head_dim;
      Start(spec);
      const int64_t head_block = kBlockTokens * harness_->geometry().BytesPerTokenPerHead();
      TestRequest request = Request(50, Either(300, 200), Either(6, 2));
      const TestOutput resident = Run(request, kResident);
      WorkerHarnessOptions options;
      options.ring_bytes = kNumContexts * 2 * 2 * head_block;
      Restart(options);
      request.chunk_tokens = 111;
      request.max_run_tokens = 128;
      for (const uint64_t plan : {kFetched, kMixed}) {
        ASSERT_EQ(Difference(resident, Run(request, plan, SealedRule::kAtOnce)), "")
            << "group " << group << ", head_dim " << head_dim << ", plan " << plan;
      }
    }
  }
}

// ---- Windows and caps ----------------------------------------------------------------------------

RandomModelSpec WindowedModel(int64_t window) {
  RandomModelSpec spec = SmallModel();
  spec.architecture = "MistralForCausalLM";
  spec.sliding_window = window;
  return spec;
}

// Windows by turns, soft caps, post-norms.
RandomModelSpec GemmaModel() {
  RandomModelSpec spec = SmallModel();
  spec.architecture = "Gemma2ForCausalLM";
  spec.sliding_window = 150;
  spec.attn_logit_softcapping = 4;
  spec.final_logit_softcapping = 6;
  spec.query_pre_attn_scalar = 96;
  return spec;
}

TEST_F(Exactness, WithWindowsInEveryLaneAndChunkSizeToo) {
  constexpr uint64_t kInPlace = 4;
  constexpr uint64_t kThreeLanes = 5;
  WorkerHarnessOptions options;
  options.attend_threads = 2;
  for (const int64_t window : Either<int64_t>({1, 64, 300, 0}, {100, 0})) {
    Start(window == 0 ? GemmaModel() : WindowedModel(window), options);
    Prepare(InPlacePlan(kInPlace, harness_->geometry()));
    Prepare(WholeHeadPlan(kThreeLanes, harness_->geometry(), [](int32_t layer, int32_t head) {
      return static_cast<Lane>((layer + head) % 3);
    }));
    TestRequest request = Request(60, Either(500, 330), Either(10, 3));
    request.max_run_tokens = 128;
    const TestOutput expected = Run(request, kResident);
    ASSERT_EQ(expected.scored.size(), request.prompt.size() - 1);
    for (const int64_t chunk : Either<int64_t>({1, 50, 64, 130, 1000}, {50})) {
      request.chunk_tokens = chunk;
      for (const uint64_t plan : {kResident, kFetched, kMixed, kInPlace, kThreeLanes}) {
        for (const SealedRule sealed : {SealedRule::kCoordinator, SealedRule::kAtOnce}) {
          ASSERT_EQ(Difference(expected, Run(request, plan, sealed)), "")
              << "window " << window << ", chunks of " << chunk << ", plan " << plan;
        }
      }
      EXPECT_EQ(harness_->retries(), 0);
    }
  }
}

TEST_F(Exactness, WithWindowsOtherSequencesDoNotShow) {
  for (const RandomModelSpec& spec : {WindowedModel(70), GemmaModel()}) {
    Start(spec);
    std::vector<TestRequest> requests;
    for (const int64_t tokens : {3, 69, 70, 71, 150, 256, 333}) {
      requests.push_back(Request(70 + static_cast<uint64_t>(tokens), tokens, Either(12, 3)));
      requests.back().chunk_tokens = 100;
    }
    RunOptions options;
    options.plan_version = kMixed;
    harness_->set_segment_used(0);
    const auto together = harness_->Run(requests, options);
    ASSERT_TRUE(together.ok()) << together.status();
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(Difference((*together)[i], Run(requests[i], kFetched)), "") << i;
    }
  }
}

// The store has given what lies behind the windows to another: a sequence that goes on draws the same, and
// one that would read from there is refused.
TEST_F(Exactness, AVacatedExtentIsNeverRead) {
  constexpr uint64_t kInPlace = 4;
  WorkerHarnessOptions options;
  options.attend_threads = 1;
  for (const int64_t window : {100, 0}) {
    Start(window == 0 ? GemmaModel() : WindowedModel(window), options);
    Prepare(InPlacePlan(kInPlace, harness_->geometry()));
    TestRequest request = Request(62, 600, 4);
    request.max_run_tokens = 64;
    const TestOutput first = Run(request, kFetched, SealedRule::kAtOnce);
    request.sealed_tokens = FloorToBlock(600);
    request.runs = first.runs;
    request.score = false;
    const auto go_on = [&](const TestRequest& from, uint64_t plan) {
      harness_->set_segment_used(static_cast<int64_t>(harness_->segment().size()) / 2);
      RunOptions run;
      run.plan_version = plan;
      run.sealed = SealedRule::kAtOnce;
      return harness_->RunOne(from, run);
    };
    const auto expected = go_on(request, kFetched);
    ASSERT_TRUE(expected.ok()) << expected.status();
    const auto in_place = go_on(request, kInPlace);
    ASSERT_TRUE(in_place.ok()) << in_place.status();
    // Beside a GPU the store's processors sum in another order: bits of their own.
    if (!OnGpu()) {
      EXPECT_EQ(Difference(*expected, *in_place), "");
    }
    TestRequest vacated = request;
    for (headroom::Run& run : vacated.runs) {
      for (int32_t layer = 0; layer < harness_->config().num_layers; ++layer) {
        const int64_t seen = harness_->config().window(layer);
        if (seen == 0 || run.first_pos + run.capacity_tokens > request.sealed_tokens - seen) continue;
        std::fill_n(harness_->ExtentRow(run, layer, 0, run.first_pos, 0),
                    run.capacity_tokens * harness_->geometry().BytesPerTokenPerLayer(), 0xff);
        run.data_offsets[layer] = headroom::Run::kVacated;
      }
    }
    for (const uint64_t plan : {kResident, kFetched, kMixed, kInPlace}) {
      const auto again = go_on(vacated, plan);
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_EQ(Difference(plan == kInPlace ? *in_place : *expected, *again), "") << "plan " << plan;
    }
    vacated.sealed_tokens -= 128;
    for (const uint64_t plan : {kResident, kFetched, kInPlace}) {
      const absl::Status status = go_on(vacated, plan).status();
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_NE(std::string(status.message()).find("first_pos 448 needs keys from position"),
                std::string::npos)
          << status;
      ASSERT_TRUE(harness_->executor().CloseAll().ok());
    }
  }
}

// A step reads a block more than its rows' windows at most, in each lane, and the device keeps no copy of
// what lies behind.
TEST_F(Exactness, WhatLiesBehindTheWindowIsNeitherReadNorKept) {
  constexpr uint64_t kInPlace = 4;
  WorkerHarnessOptions options;
  options.attend_threads = 1;
  Start(WindowedModel(300), options);
  Prepare(InPlacePlan(kInPlace, harness_->geometry()));
  const KvGeometry geometry = harness_->geometry();
  TestRequest request = Request(61, 1200, 70);
  request.chunk_tokens = 64;
  request.max_run_tokens = 128;
  for (const uint64_t plan : {kFetched, kInPlace}) {
    Run(request, plan, SealedRule::kAtOnce);
    const Lane lane = plan == kFetched ? Lane::kFetched : Lane::kInPlace;
    int64_t most = 0;
    for (const StepRecord& step : harness_->steps()) {
      most = std::max(most, step.result.lanes[static_cast<int>(lane)].bytes);
    }
    EXPECT_GT(most, (300 - 64) * geometry.BytesPerToken());
    EXPECT_LE(most, (300 + kBlockTokens) * geometry.BytesPerToken()) << "plan " << plan;
  }
  Run(request, kResident, SealedRule::kAtOnce);
  const int64_t tail = kTailTokens * geometry.BytesPerToken();
  const int64_t used = harness_->executor().memory().kv_pool_used_bytes - tail;
  EXPECT_GE(used, 256 * geometry.BytesPerToken());
  // A window, the runs that its ends lie in, and the next.
  EXPECT_LE(used, (300 + 3 * 128) * geometry.BytesPerToken());
}

}  // namespace
}  // namespace headroom
