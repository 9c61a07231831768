// Steps that are repeated, wrong, or fail half-way; what is read where; what the device refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "tests/unit/services/worker/steps_test_util.h"

namespace headroom {
namespace {

// ---------------------------------------------------------------- repeated steps

TEST_F(Steps, ARepeatedStepGivesTheSame) {
  auto first = Opening(1, 640, 300);
  auto again = std::make_unique<Step>(*first);
  again->attempt = 1;
  first->number = again->number = harness_->NewStepNumber();
  const auto tokens = Tokens(std::move(first));
  ASSERT_EQ(tokens.size(), 1u);
  EXPECT_EQ(Difference(tokens, Tokens(std::move(again))), "");
  // A chunk whose first keys were in the tail, which it has overwritten; then single tokens.
  for (StepSequence piece : {Piece(1, 300, 232), Piece(1, 532, 1), Piece(1, 533, 30)}) {
    auto step = StepOf(piece);
    auto repeated = std::make_unique<Step>(*step);
    repeated->attempt = 1;
    step->number = repeated->number = harness_->NewStepNumber();
    const auto once = Tokens(std::move(step));
    EXPECT_EQ(Difference(once, Tokens(std::move(repeated))), "") << piece.first_pos;
  }
  // And what follows is what follows without repetitions.
  const auto last = Tokens(StepOf(Piece(1, 563, 5)));
  auto opening = Opening(2, 640, 300);
  opening->sequences[0].token_ids = Piece(1, 0, 300).token_ids;
  EXPECT_EQ(Difference(tokens, Tokens(std::move(opening))), "");
  for (StepSequence piece :
       {Piece(1, 300, 232), Piece(1, 532, 1), Piece(1, 533, 30), Piece(1, 563, 5)}) {
    piece.sequence_id = 2;
    const auto without = Tokens(StepOf(piece));
    if (piece.first_pos == 563) {
      EXPECT_EQ(Difference(last, without), "");
    }
  }
}

TEST_F(Steps, ARepeatedGrantIsNotAnError) {
  Tokens(Opening(1, 64, 60));
  auto step = StepOf(Piece(1, 60, 70));
  step->grants.push_back({1, harness_->NewRun(64, 64)});
  auto repeated = std::make_unique<Step>(*step);
  repeated->attempt = 1;
  auto not_repeated = std::make_unique<Step>(*step);
  const auto once = Tokens(std::move(step));
  EXPECT_EQ(Difference(once, Tokens(std::move(repeated))), "");
  ExpectFails(std::move(not_repeated), absl::StatusCode::kInvalidArgument, "expected at position");
}

// ---------------------------------------------------------------- wrong steps

TEST_F(Steps, WrongStepsAreAnsweredAndTheExecutorGoesOn) {
  Tokens(Opening(1, 256, 100));
  const auto after = Tokens(StepOf(Piece(1, 100, 20)));

  auto no_plan = StepOf(Piece(1, 100, 20), 99);
  ExpectFails(std::move(no_plan), absl::StatusCode::kFailedPrecondition, "plan 99");
  ExpectFails(StepOf(Piece(7, 0, 3)), absl::StatusCode::kNotFound, "sequence 7 is not open");
  StepSequence piece = Piece(1, 100, 20);
  piece.token_ids[3] = 211;
  ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "token id 211");
  piece = Piece(1, 100, 20);
  piece.token_ids[3] = -1;
  ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "token id -1");
  piece = Piece(1, 100, 20);
  piece.score_token_ids.assign(21, 1);
  ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "more tokens to score");
  for (const int64_t sealed : {-64, 63, 192, 256}) {
    piece = Piece(1, 100, 20);
    piece.sealed_tokens = sealed;
    ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "sealed_tokens");
  }
  for (const int64_t first : {int64_t{-1}, int64_t{121}, std::numeric_limits<int64_t>::max()}) {
    piece = Piece(1, 100, 20);
    piece.first_pos = first;
    ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "first_pos");
  }
  ExpectFails(StepOf(Piece(1, 100, 220)), absl::StatusCode::kInvalidArgument, "extents for 256");
  ExpectFails(StepOf(Piece(1, 100, 1100)), absl::StatusCode::kInvalidArgument, "");
  auto twice = StepOf(Piece(1, 100, 20));
  twice->sequences.push_back(Piece(1, 100, 20));
  ExpectFails(std::move(twice), absl::StatusCode::kInvalidArgument, "twice");

  auto never_drawn = Opening(2, 128, 1);
  never_drawn->sequences[0].token_ids.clear();
  ExpectFails(std::move(never_drawn), absl::StatusCode::kInvalidArgument, "no token was drawn");

  // Runs.
  auto opening = Opening(3, 128, 10);
  opening->open[0].runs[1].data_offsets[1] = static_cast<int64_t>(harness_->segment().size()) - 64;
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "leaves the segment");
  opening = Opening(3, 128, 10);
  opening->open[0].runs[0].data_offsets[0] = -64;
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "leaves the segment");
  opening = Opening(3, 128, 10);
  opening->open[0].runs[1].first_pos = 128;
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "expected at position 64");
  opening = Opening(3, 128, 10);
  opening->open[0].runs[0].capacity_tokens = 96;
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "capacity 96");
  opening = Opening(3, 128, 10);
  opening->open[0].runs[0].data_offsets.pop_back();
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "2 extents");
  opening = Opening(3, 128, 10);
  opening->open[0].sealed_tokens = 192;
  ExpectFails(std::move(opening), absl::StatusCode::kInvalidArgument, "sealed_tokens 192");
  ExpectFails(Opening(1, 128, 10), absl::StatusCode::kAlreadyExists, "sequence 1 is open");

  EXPECT_EQ(Difference(after, Tokens(StepOf(Piece(1, 100, 20)))), "");
}

TEST_F(Steps, SlotsRunOutAndComeBack) {
  for (uint64_t id = 1; id <= 4; ++id) Tokens(Opening(id, 64, 10));
  ExpectFails(Opening(5, 64, 10), absl::StatusCode::kResourceExhausted, "4 sequence slots");
  auto step = Opening(5, 64, 10);
  step->close.push_back(2);
  EXPECT_EQ(Tokens(std::move(step)).size(), 1u);
}

TEST_F(Steps, ATailDoesNotHoldWhatAChunkLeftBehind) {
  Tokens(Opening(1, 640, 400));
  StepSequence piece = Piece(1, 400, 1);
  piece.sealed_tokens = 320;
  ExpectFails(StepOf(piece), absl::StatusCode::kInvalidArgument, "from position 384 on");
}

TEST_F(Steps, PlansMustCoverEveryHeadOnce) {
  const auto code = [&](const Plan& plan) {
    return harness_->executor().PreparePlan(plan).code();
  };
  const KvGeometry geometry = harness_->geometry();
  Plan plan = FetchedPlan(10, geometry);
  plan.layers.pop_back();
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
  plan = FetchedPlan(10, geometry);
  plan.layers[1].pop_back();
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
  plan = SplitHeadPlan(10, geometry, 1, 128, Lane::kResident, Lane::kFetched);
  EXPECT_EQ(code(plan), absl::StatusCode::kOk);
  plan.layers[2].back().first_pos = 192;  // a hole
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
  plan.layers[2].back().first_pos = 64;  // an overlap
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
  plan = SplitHeadPlan(10, geometry, 1, 128, Lane::kResident, Lane::kFetched);
  std::reverse(plan.layers[2].begin(), plan.layers[2].end());
  EXPECT_EQ(code(plan), absl::StatusCode::kOk);  // in any order
  plan = FetchedPlan(10, geometry);
  plan.layers[0].push_back(plan.layers[0][0]);  // twice
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
  plan = FetchedPlan(10, geometry);
  plan.layers[0][0].kv_head_end = 7;  // heads that there are not
  EXPECT_EQ(code(plan), absl::StatusCode::kInvalidArgument);
}

TEST_F(Steps, MoreStepsThanTheProtocolAllowsAreRefused) {
  Tokens(Opening(1, 1024, 700));
  int refused = 0;
  int taken = 0;
  for (int i = 0; i < 40; ++i) {
    const absl::Status status = harness_->Submit(StepOf(Piece(1, 100, 300)));
    ++(status.ok() ? taken : refused);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    }
  }
  EXPECT_GT(refused, 0);
  for (int i = 0; i < taken; ++i) {
    EXPECT_NE(harness_->Await(), nullptr);
  }
}

// ---------------------------------------------------------------- failures half-way

// The segment is not registered with the device: the first operation that names it is refused, with
// work of the step enqueued already.
TEST_F(Steps, AStepThatFailsHalfWayLeavesTheExecutorWhole) {
  TestRequest request;
  request.prompt = RandomTokens(5, 400, harness_->config().vocab);
  request.num_draws = 5;
  RunOptions options;
  options.plan_version = kFetched;
  const auto expected = harness_->RunOne(request, options);
  ASSERT_TRUE(expected.ok()) << expected.status();

  std::vector<uint8_t> foreign(harness_->segment().size());
  ASSERT_TRUE(harness_->executor()
                  .AttachSegment({foreign.data(), static_cast<int64_t>(foreign.size())})
                  .ok());
  ExpectFails(Opening(1, 640, 300), absl::StatusCode::kInternal, "registered host memory");
  // Nothing of it counts: its keys are not known.
  ExpectFails(StepOf(Piece(1, 300, 1)), absl::StatusCode::kInvalidArgument, "first_pos 300");

  ASSERT_TRUE(harness_->executor()
                  .AttachSegment({harness_->segment().data(),
                                  static_cast<int64_t>(harness_->segment().size())})
                  .ok());
  ExpectFails(StepOf(Piece(1, 0, 3)), absl::StatusCode::kNotFound, "not open");
  const auto after = harness_->RunOne(request, options);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(Difference(*expected, *after), "");
  EXPECT_EQ(std::count(foreign.begin(), foreign.end(), 0),
            static_cast<int64_t>(foreign.size()));
}

// ---------------------------------------------------------------- it is real

TEST_F(Steps, OnlyWhatReadsAnExtentSeesItChanged) {
  for (const int32_t damaged_head : {0, 1}) {
    for (const uint64_t plan : {kResident, kFetched, kMixed}) {
      harness_->set_segment_used(0);
      const uint64_t id = harness_->NewSequenceId();
      auto opening = Opening(id, 320, 260, plan);
      const struct Run run = opening->open[0].runs[1];
      StepSequence chunk = Piece(1, 0, 260);
      chunk.sequence_id = id;
      opening->sequences = {chunk};
      Tokens(std::move(opening));
      StepSequence next = Piece(1, 260, 1);
      next.sequence_id = id;
      const auto before = Tokens(StepOf(next, plan));
      const auto same = Tokens(StepOf(next, plan));
      ASSERT_EQ(Difference(before, same), "");
      for (int64_t pos = 70; pos < 110; ++pos) {
        uint8_t* const row = harness_->ExtentRow(run, 1, damaged_head, pos, /*part=*/1);
        for (int64_t i = 0; i < 128; ++i) row[i] ^= 0x80;  // signs, among others
      }
      const auto after = Tokens(StepOf(next, plan));
      const bool reads = plan == kFetched || (plan == kMixed && damaged_head == 1);
      EXPECT_EQ(Difference(before, after) != "", reads)
          << "plan " << plan << ", head " << damaged_head;
      auto close = std::make_unique<Step>();
      close->close.push_back(id);
      Tokens(std::move(close));
    }
  }
}

// Bytes are counted where they move, and are what the geometry says: of every key of every head once
// a step in its lane; what a step finishes is sealed once.
TEST_F(Steps, BytesOfTheLanesAreGeometryTimesTokens) {
  const KvGeometry geometry = harness_->geometry();
  plans_[4] = SplitHeadPlan(4, geometry, 1, 128, Lane::kResident, Lane::kFetched);
  plans_[5] = SplitHeadPlan(5, geometry, 0, 128, Lane::kFetched, Lane::kResident);
  Prepare(plans_[4]);
  Prepare(plans_[5]);
  for (const auto& [version, plan] : plans_) {
    harness_->set_segment_used(0);
    std::vector<TestRequest> requests(2);
    for (int i = 0; i < 2; ++i) {
      requests[i].prompt = RandomTokens(i, 350 + 40 * i, harness_->config().vocab);
      requests[i].num_draws = 40;
      requests[i].chunk_tokens = 150;
      requests[i].max_run_tokens = 64 << i;
    }
    RunOptions options;
    options.plan_version = version;
    const auto outputs = harness_->Run(requests, options);
    ASSERT_TRUE(outputs.ok()) << outputs.status();
    ASSERT_GT(harness_->steps().size(), 40u);
    for (const StepRecord& step : harness_->steps()) {
      int64_t keys[kNumLanes] = {};
      int64_t sealed = 0;
      for (const StepSequence& piece : step.sequences) {
        for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
          for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
            for (const struct Run& run : step.runs.at(piece.sequence_id)) {
              const int64_t count = std::clamp<int64_t>(piece.sealed_tokens - run.first_pos, 0,
                                                        run.capacity_tokens);
              keys[static_cast<int>(plan.LaneOf(layer, head, run.first_pos))] += count;
            }
            keys[static_cast<int>(Lane::kResident)] += piece.end_pos() - piece.sealed_tokens;
          }
        }
        sealed += FloorToBlock(piece.end_pos()) - FloorToBlock(piece.first_pos);
      }
      for (int lane = 0; lane < kNumLanes; ++lane) {
        ASSERT_EQ(step.result.lanes[lane].bytes, keys[lane] * geometry.BytesPerTokenPerHead())
            << "plan " << version << ", lane " << lane;
      }
      ASSERT_EQ(step.result.sealed_bytes, sealed * geometry.BytesPerToken()) << version;
      ASSERT_NEAR(step.result.lanes[0].kv_heads + step.result.lanes[1].kv_heads,
                  geometry.num_kv_heads, 1e-9);
    }
  }
}

TEST_F(Steps, EveryKeyIsSealedToItsExtent) {
  // Two ways to the same keys leave the same bytes in the extents.
  TestRequest request;
  request.prompt = RandomTokens(9, 500, harness_->config().vocab);
  request.num_draws = 100;
  request.max_run_tokens = 128;
  std::vector<std::vector<uint8_t>> bytes;
  for (const auto& [chunk, plan] : {std::pair<int64_t, uint64_t>{1000, kResident}, {1, kFetched},
                                    {70, kMixed}}) {
    harness_->set_segment_used(0);
    std::fill(harness_->segment().begin(), harness_->segment().end(), 0xff);
    request.chunk_tokens = chunk;
    RunOptions options;
    options.plan_version = plan;
    const auto output = harness_->RunOne(request, options);
    ASSERT_TRUE(output.ok()) << output.status();
    ASSERT_EQ(output->sealed_tokens, 576);
    bytes.emplace_back();
    for (int32_t layer = 0; layer < harness_->config().num_layers; ++layer) {
      for (int32_t head = 0; head < 2; ++head) {
        for (const struct Run& run : output->runs) {
          const int64_t end =
              std::min(run.first_pos + run.capacity_tokens, output->sealed_tokens);
          for (int64_t pos = run.first_pos; pos < end; ++pos) {
            for (const int part : {0, 1}) {
              const uint8_t* const row = harness_->ExtentRow(run, layer, head, pos, part);
              ASSERT_TRUE(std::any_of(row, row + 128, [](uint8_t b) { return b != 0xff; }));
              bytes.back().insert(bytes.back().end(), row, row + 128);
            }
          }
        }
      }
    }
    EXPECT_EQ(bytes.back() == bytes[0], true) << "chunks of " << chunk;
  }
}

TEST_F(Steps, OperationsRefuseMemoryThatIsNotTheDevices) {
  Device& device = harness_->device();
  auto stream = device.CreateStream("test");
  auto arena = device.Allocate(4096, "test");
  ASSERT_TRUE(stream.ok() && arena.ok()) << stream.status() << arena.status();
  std::vector<uint8_t> foreign(4096);
  CopyArgs copy;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = 4096;
  const auto code = [&](void* dst, const void* src) {
    copy.dst = dst;
    copy.src = src;
    return device.Copy(*stream, copy).code();
  };
  EXPECT_EQ(code(*arena, harness_->segment().data()), absl::StatusCode::kOk);
  EXPECT_EQ(code(*arena, foreign.data()), absl::StatusCode::kInternal);
  EXPECT_EQ(code(foreign.data(), *arena), absl::StatusCode::kInternal);
  EXPECT_EQ(code(*arena, harness_->segment().data() + harness_->segment().size() - 4095),
            absl::StatusCode::kInternal);
  kernels::RmsNormArgs norm;
  norm.x = reinterpret_cast<const float*>(*arena);
  norm.weight = reinterpret_cast<const kernels::BFloat16*>(*arena);
  norm.out = reinterpret_cast<float*>(foreign.data());
  norm.rows = norm.x_rows = 1;
  norm.hidden = 16;
  EXPECT_EQ(device.RmsNorm(*stream, norm).code(), absl::StatusCode::kInternal);
  // Registered host memory is for copies only.
  norm.out = reinterpret_cast<float*>(harness_->segment().data());
  EXPECT_EQ(device.RmsNorm(*stream, norm).code(), absl::StatusCode::kInternal);
  norm.out = reinterpret_cast<float*>(*arena + 1024);
  EXPECT_EQ(device.RmsNorm(*stream, norm).code(), absl::StatusCode::kOk);
  const auto event = device.CreateEvent();
  ASSERT_TRUE(event.ok() && device.Record(*stream, *event).ok());
  EXPECT_TRUE(device.Synchronize(*event, absl::Seconds(30)).ok());
}

}  // namespace
}  // namespace headroom
