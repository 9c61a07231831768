// The calibration runs real steps: what it finds is positive, and it leaves nothing behind.
#include "services/worker/lane_calibration.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "tests/common/worker_harness.h"

namespace headroom {
namespace {

class CalibrationTest : public ::testing::TestWithParam<int> {};

TEST_P(CalibrationTest, FindsCostsAndLeavesNothingBehind) {
  const RandomModelSpec spec = SmallModel();
  const auto folder = RandomModelFolder::Create(spec);
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.attend_threads = GetParam();
  options.max_context_tokens = 8192;
  auto harness = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_TRUE(harness.ok()) << harness.status();
  WorkerHarness& h = **harness;

  // What a sequence has computed before.
  ASSERT_TRUE(h.executor().PreparePlan(ResidentPlan(7, h.geometry())).ok());
  TestRequest request;
  request.prompt = RandomTokens(1, 300, spec.vocab_size);
  request.num_draws = 4;
  RunOptions run;
  run.plan_version = 7;
  const auto before = h.RunOne(request, run);
  ASSERT_TRUE(before.ok()) << before.status();
  const std::vector<uint8_t> bytes = h.segment();

  StepPort port;
  port.submit = [&](std::unique_ptr<Step> step) { return h.executor().Submit(std::move(step)); };
  port.take = [&]() -> absl::StatusOr<std::unique_ptr<Step>> {
    std::unique_ptr<Step> step = h.Await();
    if (step == nullptr) return absl::DeadlineExceededError("no step");
    return step;
  };
  port.next_number = [&] { return h.NewStepNumber(); };
  CalibrationOptions calibration;
  calibration.segment_bytes = static_cast<int64_t>(h.segment().size());
  calibration.budget = h.budget();
  calibration.time_limit = absl::Minutes(2);
  const absl::StatusOr<LaneCosts> costs =
      CalibrateLanes(h.executor(), h.config(), calibration, port);
  ASSERT_TRUE(costs.ok()) << costs.status();
  EXPECT_GT(costs->base_seconds, 0);
  EXPECT_GT(costs->resident_base_seconds, 0);
  EXPECT_LE(costs->resident_base_seconds, costs->base_seconds);
  for (int lane = 0; lane < kNumLanes; ++lane) {
    EXPECT_GE(costs->seconds_per_byte[lane], 0) << lane;
    EXPECT_GT(costs->busy_seconds_per_byte[lane], 0) << lane;
  }
  EXPECT_GE(costs->hidden_base, 0);
  EXPECT_LE(costs->hidden_base, 1);
  EXPECT_GE(costs->in_place_seconds, 0);
  EXPECT_GE(costs->fetched_slowdown, 1);
  EXPECT_GE(costs->in_place_slowdown, 1);
  EXPECT_LE(1 / costs->fetched_slowdown + 1 / costs->in_place_slowdown, 2);
  if (GetParam() > 0) {
    EXPECT_GT(h.pool()->counters().posts, 0u);
  }

  // It has sealed nothing, and sequences run as before.
  EXPECT_TRUE(bytes == h.segment());
  h.set_segment_used(0);
  const auto after = h.RunOne(request, run);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(Difference(*before, *after), "");
}

INSTANTIATE_TEST_SUITE_P(AttendThreads, CalibrationTest, ::testing::Values(0, 1));

TEST(Calibration, StepsReadAsMuchOfALayerWhateverAToken) {
  DeviceBudget budget;
  budget.product_type = kernels::ElementType::kBFloat16;
  budget.max_context_tokens = int64_t{1} << 20;
  const auto tokens = [&](int32_t kv_heads, int32_t head_dim) {
    KvGeometry geometry;
    geometry.num_layers = 32;
    geometry.num_kv_heads = kv_heads;
    geometry.head_dim = head_dim;
    return CalibrationTokens(geometry, budget);
  };
  EXPECT_EQ(tokens(8, 128), 32768);   // Llama-3-8B
  EXPECT_EQ(tokens(32, 128), 8192);   // Llama-2-7B
  EXPECT_EQ(tokens(8, 256), 16384);   // Gemma-2-9B
  EXPECT_EQ(tokens(4, 128), 32768);   // Qwen2-7B: not more
  EXPECT_EQ(tokens(128, 256), 4096);  // nor less than this
  budget.max_context_tokens = 32768;  // of which a block is computed
  EXPECT_EQ(tokens(8, 128), 16384);
  budget.product_type = kernels::ElementType::kFloat32;
  EXPECT_EQ(tokens(8, 128), 4096);
}

TEST(Calibration, GivesUpInTime) {
  RandomModelSpec spec;
  spec.num_layers = 2;
  const auto folder = RandomModelFolder::Create(spec);
  ASSERT_TRUE(folder.ok()) << folder.status();
  auto harness = WorkerHarness::Create((*folder)->path(), {});
  ASSERT_TRUE(harness.ok()) << harness.status();
  WorkerHarness& h = **harness;
  StepPort port;
  port.submit = [&](std::unique_ptr<Step> step) { return h.executor().Submit(std::move(step)); };
  port.take = [&]() -> absl::StatusOr<std::unique_ptr<Step>> { return h.Await(); };
  port.next_number = [&] { return h.NewStepNumber(); };
  CalibrationOptions calibration;
  calibration.segment_bytes = static_cast<int64_t>(h.segment().size());
  calibration.time_limit = absl::ZeroDuration();
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      CalibrateLanes(h.executor(), h.config(), calibration, port).status()));
}

}  // namespace
}  // namespace headroom
