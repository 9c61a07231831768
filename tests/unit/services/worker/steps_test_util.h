// An executor on the CPU device and steps for it, of a small random model.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_WORKER_STEPS_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_WORKER_STEPS_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/common/worker_harness.h"
#include "tests/unit/services/worker/executor_test_util.h"

namespace headroom {

class Steps : public ::testing::Test {
 protected:
  void SetUp() override {
    auto folder = RandomModelFolder::Create(SmallModel(4, 2));
    ASSERT_TRUE(folder.ok()) << folder.status();
    folder_ = *std::move(folder);
    WorkerHarnessOptions options;
    options.max_sequences = 4;
    Configure(options);
    auto harness = WorkerHarness::Create(folder_->path(), options);
    ASSERT_TRUE(harness.ok()) << harness.status();
    harness_ = *std::move(harness);
    const KvGeometry geometry = harness_->geometry();
    plans_[kResident] = ResidentPlan(kResident, geometry);
    plans_[kFetched] = FetchedPlan(kFetched, geometry);
    plans_[kMixed] = WholeHeadPlan(kMixed, geometry, [](int32_t, int32_t head) {
      return head == 0 ? Lane::kResident : Lane::kFetched;
    });
    for (const auto& [version, plan] : plans_) Prepare(plan);
  }
  virtual void Configure(WorkerHarnessOptions&) {}
  void Prepare(const Plan& plan) {
    const absl::Status status = harness_->executor().PreparePlan(plan);
    ASSERT_TRUE(status.ok()) << status;
  }

  // A step that opens a sequence with room for `capacity` tokens and computes `tokens` of it.
  std::unique_ptr<Step> Opening(uint64_t id, int64_t capacity, int64_t tokens,
                                uint64_t plan = kFetched) {
    auto step = std::make_unique<Step>();
    step->plan_version = plan;
    OpenSequence open;
    open.sequence_id = id;
    for (int64_t pos = 0; pos < capacity; pos += 64) open.runs.push_back(harness_->NewRun(pos, 64));
    step->open.push_back(std::move(open));
    step->sequences.push_back(Piece(id, 0, tokens));
    return step;
  }
  StepSequence Piece(uint64_t id, int64_t first_pos, int64_t tokens) {
    StepSequence piece;
    piece.sequence_id = id;
    piece.first_pos = first_pos;
    piece.token_ids = RandomTokens(first_pos + 1000 * id, tokens, harness_->config().vocab);
    piece.sealed_tokens = FloorToBlock(first_pos);
    piece.draw = true;
    return piece;
  }
  std::unique_ptr<Step> StepOf(StepSequence piece, uint64_t plan = kFetched) {
    auto step = std::make_unique<Step>();
    step->plan_version = plan;
    step->sequences.push_back(std::move(piece));
    return step;
  }
  void ExpectFails(std::unique_ptr<Step> step, absl::StatusCode code, const std::string& words) {
    const std::unique_ptr<Step> ended = harness_->RunStep(std::move(step));
    EXPECT_EQ(ended->result.status.code(), code) << ended->result.status;
    EXPECT_NE(std::string(ended->result.status.message()).find(words), std::string::npos)
        << ended->result.status;
    EXPECT_TRUE(ended->result.tokens.empty());
  }
  std::vector<kernels::SampleResult> Tokens(std::unique_ptr<Step> step) {
    const std::unique_ptr<Step> ended = harness_->RunStep(std::move(step));
    EXPECT_TRUE(ended->result.status.ok()) << ended->result.status;
    return ended->result.tokens;
  }

  std::unique_ptr<RandomModelFolder> folder_;
  std::unique_ptr<WorkerHarness> harness_;
  std::map<uint64_t, Plan> plans_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_SERVICES_WORKER_STEPS_TEST_UTIL_H_
