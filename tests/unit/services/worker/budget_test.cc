// The division of the budget, held by a real executor: nothing is allocated beyond it, and the least
// that a refusal names does run.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/types.h"
#include "tests/common/worker_harness.h"

namespace headroom {
namespace {

RandomModelSpec Model() {
  RandomModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 96;
  spec.num_q_heads = 6;
  spec.num_kv_heads = 3;
  spec.intermediate_size = 136;
  spec.vocab_size = 211;
  return spec;
}

TEST(Budget, HoldsEverythingAndNothingGoesBeyondIt) {
  const auto folder = RandomModelFolder::Create(Model());
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.budget_bytes = 1 << 20;
  const auto refused = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string message(refused.status().message());
  const std::string before = "needs at least ";
  ASSERT_NE(message.find(before), std::string::npos) << message;
  const int64_t least = std::stoll(message.substr(message.find(before) + before.size())) << 20;

  TestRequest request;
  request.prompt = RandomTokens(1, 700, 211);
  request.num_draws = 20;
  request.max_run_tokens = 256;
  TestOutput expected;
  for (const int64_t more : {int64_t{0}, int64_t{1} << 20, int64_t{5} << 20, int64_t{64} << 20}) {
    for (const int64_t chunk : {64, 512}) {
      options.budget_bytes = least + more;
      options.chunk_limit_tokens = chunk;
      auto harness = WorkerHarness::Create((*folder)->path(), options);
      ASSERT_TRUE(harness.ok()) << harness.status();
      StepExecutor& executor = (*harness)->executor();
      ASSERT_TRUE(executor.PreparePlan(ResidentPlan(1, (*harness)->geometry())).ok());
      const auto output = (*harness)->RunOne(request);
      ASSERT_TRUE(output.ok()) << output.status();
      if (expected.drawn.empty()) expected = *output;
      EXPECT_EQ(Difference(expected, *output), "") << least + more;
      const StepExecutor::Memory memory = executor.memory();
      EXPECT_LE(memory.arena.high_water_bytes, options.budget_bytes);
      EXPECT_EQ(memory.arena.capacity_bytes, options.budget_bytes);
      // What was set aside for aligning buffers is all that is not handed out.
      EXPECT_GE(memory.arena.used_bytes, options.budget_bytes - (256 << 10));
      EXPECT_LE(memory.kv_pool_high_water_bytes, memory.kv_pool_bytes);
      EXPECT_GT(memory.kv_pool_high_water_bytes, 0);
    }
  }
}

// As a CUDA device does for cuBLASLt, which only shows on a GPU host.
TEST(Budget, WhatADeviceTakesOfItsArenaIsNotDivided) {
  constexpr int64_t kTaken = int64_t{32} << 20;
  const auto folder = RandomModelFolder::Create(Model());
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.wrap_device = [](std::unique_ptr<Device> device) {
    EXPECT_TRUE(device->Allocate(kTaken, "a library's workspace").ok());
    return device;
  };
  auto harness = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_TRUE(harness.ok()) << harness.status();
  EXPECT_LE((*harness)->budget().budget_bytes, options.budget_bytes - kTaken);
  EXPECT_GE((*harness)->executor().memory().arena.used_bytes, options.budget_bytes - (256 << 10));
}

// Where there are windows extents are short, in layers that see everything too.
TEST(Budget, ATableHasRoomForEachExtentOfTheLongestContext) {
  RandomModelSpec spec = Model();
  WorkerHarnessOptions options;
  options.max_context_tokens = 1 << 16;
  options.chunk_limit_tokens = 64;
  std::vector<int64_t> table_bytes;
  for (const int64_t window : {1 << 16, 256}) {
    spec.architecture = "MistralForCausalLM";
    spec.sliding_window = window;
    const auto folder = RandomModelFolder::Create(spec);
    ASSERT_TRUE(folder.ok()) << folder.status();
    const auto harness = WorkerHarness::Create((*folder)->path(), options);
    ASSERT_TRUE(harness.ok()) << harness.status();
    table_bytes.push_back((*harness)->budget().table_bytes);
  }
  // Of 2 layers and 3 KV heads, 256 extents in place of 4; a sequence has 6 sizes fewer to grow through.
  EXPECT_GT(table_bytes[1] - table_bytes[0],
            2 * 3 * (256 - 4 - 16 * 6) * static_cast<int64_t>(sizeof(kernels::KvSpan)));
}

// With a pool of one tail a second sequence is refused with the numbers; it works after the first.
TEST(Budget, ATailThatDoesNotFitIsRefused) {
  const auto folder = RandomModelFolder::Create(Model());
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.budget_bytes = 1 << 20;
  const auto refused = WorkerHarness::Create((*folder)->path(), options);
  const std::string message(refused.status().message());
  const std::string before = "needs at least ";
  ASSERT_NE(message.find(before), std::string::npos) << message;
  options.budget_bytes = std::stoll(message.substr(message.find(before) + before.size())) << 20;
  options.chunk_limit_tokens = 64;
  auto harness = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_TRUE(harness.ok()) << harness.status();
  ASSERT_TRUE((*harness)->executor().PreparePlan(FetchedPlan(1, (*harness)->geometry())).ok());
  const int64_t tails =
      (*harness)->budget().kv_pool_bytes / (*harness)->budget().tail_bytes_per_sequence;
  const auto opening = [&](uint64_t id) {
    auto step = std::make_unique<Step>();
    step->plan_version = 1;
    step->open.push_back({id, {}, 0});
    StepSequence piece;
    piece.sequence_id = id;
    piece.token_ids = {1, 2, 3};
    piece.draw = true;
    step->sequences.push_back(piece);
    return step;
  };
  for (int64_t id = 1; id <= tails; ++id) {
    ASSERT_TRUE((*harness)->RunStep(opening(id))->result.status.ok());
  }
  const auto full = (*harness)->RunStep(opening(tails + 1));
  EXPECT_EQ(full->result.status.code(), absl::StatusCode::kResourceExhausted)
      << full->result.status;
  auto step = opening(tails + 1);
  step->close.push_back(1);
  EXPECT_TRUE((*harness)->RunStep(std::move(step))->result.status.ok());
}

}  // namespace
}  // namespace headroom
