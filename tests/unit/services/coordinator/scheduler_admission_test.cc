// Who gets in, how many answers a request has, and where keys are planned to lie.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

class SchedulerAdmissionTest : public SchedulerFixture {};

TEST_F(SchedulerAdmissionTest, RefusesWhatCanNeverFit) {
  machine_->host_tokens = 2048;
  Start();
  auto outcome = Submit(Prompt(100), 5000);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(outcome->status()), "DOES_NOT_FIT");
}

TEST_F(SchedulerAdmissionTest, WaitsForHostMemoryInsteadOfOvercommitting) {
  machine_->host_tokens = 2048;
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 6; ++i) outcomes.push_back(Submit(Prompt(700, i), 300));
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(700, i), 300));
  }
}

TEST_F(SchedulerAdmissionTest, AFullQueueSaysWhenToTryAgain) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->max_sequences = 1;
  SchedulerOptions options;
  options.max_queue = 2;
  Start(options);
  auto running = Submit(Prompt(10), 1000);
  ASSERT_TRUE(running->WaitForTokens(1));
  auto first = Submit(Prompt(10), 1);
  auto second = Submit(Prompt(10), 1);
  auto third = Submit(Prompt(10), 1);
  ASSERT_TRUE(third->WaitForEnd());
  EXPECT_EQ(ReasonOf(third->status()), "QUEUE_FULL");
  EXPECT_TRUE(RetryAfterOf(third->status()).has_value());
  EXPECT_FALSE(first->done());
}

// What became of the answers of one request.
class Answers : public RequestSink {
 public:
  explicit Answers(int n) : tokens_(n), ended_(n) {}
  void OnAccepted() override {}
  void OnDelta(v1::Delta delta) override {
    MutexLock lock(&mutex_);
    for (const v1::TokenRecord& token : delta.tokens()) {
      tokens_.at(delta.index()).push_back(token.token_id());
    }
  }
  void OnFinished(const absl::Status& status, v1::Finished finished) override {
    MutexLock lock(&mutex_);
    statuses_.insert(status.code());
    seeds_.insert(finished.seed());
    EXPECT_FALSE(ended_.at(finished.index())) << finished.index();
    ended_[finished.index()] = true;
  }
  bool CanTake() const override { return true; }

  size_t ended() {
    MutexLock lock(&mutex_);
    return std::count(ended_.begin(), ended_.end(), true);
  }
  std::vector<std::vector<int32_t>> tokens() {
    MutexLock lock(&mutex_);
    return tokens_;
  }
  std::set<absl::StatusCode> statuses() {
    MutexLock lock(&mutex_);
    return statuses_;
  }
  size_t seeds() {
    MutexLock lock(&mutex_);
    return seeds_.size();
  }

 private:
  Mutex mutex_;
  std::vector<std::vector<int32_t>> tokens_;
  std::vector<bool> ended_;
  std::set<absl::StatusCode> statuses_;
  std::set<uint64_t> seeds_;
};

TEST_F(SchedulerAdmissionTest, EachOfSeveralAnswersIsASequence) {
  Start();
  auto request = MakeRequest(Prompt(100), 20);
  request->n = 4;
  request->session_id = "kept";
  const auto answers = std::make_shared<Answers>(4);
  ASSERT_TRUE(SubmitTo(answers, *request).ok());
  ASSERT_TRUE(Eventually([&] { return answers->ended() == 4; }));
  auto alone = Submit(Prompt(100), 20);
  ASSERT_TRUE(alone->WaitForEnd());
  for (const std::vector<int32_t>& tokens : answers->tokens()) EXPECT_EQ(tokens, alone->tokens());
  EXPECT_EQ(answers->seeds(), 4u);
  ASSERT_TRUE(IdleSession("kept"));
  EXPECT_TRUE(Eventually([this] {
    MutexLock lock(&machine_->mutex);
    return machine_->stored.size() == 1;
  })) << "the session keeps one of them";
  // The id is free again when the last of them has gone.
  auto again = MakeRequest(Prompt(10), 1);
  again->id = request->id;
  auto outcome = Submit(std::move(again));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
}

TEST_F(SchedulerAdmissionTest, CancelEndsAnswersThatRunAndThatWait) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->max_sequences = 2;
  Start();
  auto request = MakeRequest(Prompt(10), 1000);
  request->n = 4;
  const auto answers = std::make_shared<Answers>(4);
  ASSERT_TRUE(SubmitTo(answers, *request).ok());
  ASSERT_TRUE(Eventually([&] { return !answers->tokens()[1].empty(); }));
  auto twin = MakeRequest(Prompt(10), 1);
  twin->id = request->id;
  EXPECT_EQ(Submit(std::move(twin))->status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(answers->ended(), 0u);
  scheduler_->Cancel(request->id);
  ASSERT_TRUE(Eventually([&] { return answers->ended() == 4; }));
  EXPECT_EQ(answers->statuses(), std::set<absl::StatusCode>{absl::StatusCode::kCancelled});
  EXPECT_TRUE(answers->tokens()[2].empty());
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerAdmissionTest, EachAnswerTakesAPlaceInTheQueue) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->max_sequences = 1;
  SchedulerOptions options;
  options.max_queue = 3;
  Start(options);
  auto running = Submit(Prompt(10), 1000);
  ASSERT_TRUE(running->WaitForTokens(1));
  const auto submit = [&](int n) {
    auto request = MakeRequest(Prompt(10), 1);
    request->n = n;
    return SubmitTo(std::make_shared<Answers>(n), *request);
  };
  EXPECT_TRUE(submit(2).ok());
  EXPECT_EQ(ReasonOf(submit(2)), "QUEUE_FULL");
  EXPECT_EQ(ReasonOf(submit(4)), "DOES_NOT_FIT");
  EXPECT_TRUE(submit(1).ok());
}

TEST(SeedOfAnswer, DiffersFromAnswerToAnswerAndTheFirstIsTheRequests) {
  std::set<uint64_t> seeds;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{2}, ~uint64_t{0}}) {
    EXPECT_EQ(SeedOfAnswer(seed, 0), seed);
    for (int32_t index = 0; index < 16; ++index) seeds.insert(SeedOfAnswer(seed, index));
  }
  EXPECT_EQ(seeds.size(), 64u);
}

TEST_F(SchedulerAdmissionTest, AnIdInUseIsRefused) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto request = MakeRequest(Prompt(10), 1000);
  auto twin = MakeRequest(Prompt(10), 1);
  twin->id = request->id;
  auto outcome = Submit(std::move(request));
  auto refused = Submit(std::move(twin));
  EXPECT_EQ(refused->status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(outcome->done());
}

TEST_F(SchedulerAdmissionTest, InPlaceIsRefusedByAStoreThatDoesNotAttend) {
  Start();
  auto request = MakeRequest(Prompt(10), 1);
  request->placement.automatic = false;
  request->placement.shares = {0.5, 0, 0.5};
  auto outcome = Submit(std::move(request));
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome->status().message(), "in place is not served by this store (attend threads 0)");
}

TEST_F(SchedulerAdmissionTest, AnotherPlacementWaitsUntilTheRunningOneHasDrained) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto automatic = Submit(Prompt(200), 100);
  auto request = MakeRequest(Prompt(200, 2), 10);
  request->placement.automatic = false;
  request->placement.shares = {0, 1, 0};
  auto fetched = Submit(std::move(request));
  ASSERT_TRUE(fetched->WaitForEnd());
  EXPECT_TRUE(automatic->done());
  EXPECT_EQ(fetched->tokens(), FakeAnswer(Prompt(200, 2), 10));
  const v1::Plan plan = Under(&FakeMachine::plans).back();
  ASSERT_EQ(plan.layers(0).ranges_size(), 1);
  EXPECT_EQ(plan.layers(0).ranges(0).lane(), v1::LANE_FETCHED);
}

TEST_F(SchedulerAdmissionTest, AResidentShareThatDoesNotFitIsRefusedWithTheNumbers) {
  machine_->pool_tokens = 512;
  Start();
  auto request = MakeRequest(Prompt(1000), 10);
  request->placement.automatic = false;
  request->placement.shares = {1, 0, 0};
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kResourceExhausted);
}

// ---------------------------------------------------------------- plans

TEST_F(SchedulerAdmissionTest, AutomaticPlansNeverPromiseMoreThanThePoolHolds) {
  machine_->pool_tokens = 4 * kTailTokens + 700;
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 6; ++i) outcomes.push_back(Submit(Prompt(100 + 150 * i, i), 1500));
  for (auto& outcome : outcomes) {
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  }
  // Plays the steps again and counts what is resident.
  const KvGeometry geometry = machine_->geometry;
  std::map<uint64_t, v1::Plan> plans;
  for (const v1::Plan& plan : Under(&FakeMachine::plans)) plans[plan.version()] = plan;
  std::map<uint64_t, std::vector<v1::ExtentRun>> open;
  int64_t most_resident = 0;
  for (const v1::StepRequest& step : Under(&FakeMachine::sent)) {
    for (const uint64_t id : step.close_sequence_ids()) open.erase(id);
    for (const v1::OpenSequence& opening : step.open_sequences()) {
      open[opening.sequence_id()] = {opening.runs().begin(), opening.runs().end()};
    }
    for (const v1::ExtentGrant& grant : step.grants()) {
      open[grant.sequence_id()].push_back(grant.run());
    }
    if (step.sequences().empty()) continue;
    int64_t resident = 0;
    for (const v1::LayerPlan& layer : plans[step.plan_version()].layers()) {
      for (const v1::LaneRange& range : layer.ranges()) {
        if (range.lane() != v1::LANE_RESIDENT) continue;
        for (const auto& [id, runs] : open) {
          for (const v1::ExtentRun& run : runs) {
            if (run.first_pos() < range.first_pos()) continue;
            if (range.has_end_pos() && run.first_pos() >= range.end_pos()) continue;
            resident += (range.kv_head_end() - range.kv_head_begin()) * run.capacity_tokens() *
                        geometry.BytesPerTokenPerHead();
          }
        }
      }
    }
    most_resident = std::max(most_resident, resident);
    EXPECT_LE(resident + static_cast<int64_t>(open.size()) * kTailTokens * geometry.BytesPerToken(),
              machine_->pool_tokens * geometry.BytesPerToken())
        << "step " << step.number();
  }
  // What there is beside the tails, 700 tokens, is used. Extents double in size: how much of it they can fill
  // hangs on which requests run side by side, but the largest that fits has 512.
  EXPECT_GE(most_resident, 512 * geometry.BytesPerToken());
}

TEST_F(SchedulerAdmissionTest, ADeterministicRequestKeepsItsPlan) {
  machine_->pool_tokens = 4 * kTailTokens + 700;
  machine_->step_time = absl::Milliseconds(1);
  Start();
  auto request = MakeRequest(Prompt(500), 1400);
  request->deterministic = true;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForTokens(10));
  std::vector<std::shared_ptr<Outcome>> others;
  for (int i = 0; i < 5; ++i) others.push_back(Submit(Prompt(300, i), 50));
  ASSERT_TRUE(outcome->WaitForEnd());
  for (auto& other : others) ASSERT_TRUE(other->WaitForEnd());
  std::set<uint64_t> versions;
  for (const v1::StepRequest& step : Under(&FakeMachine::sent)) {
    for (const v1::StepSequence& sequence : step.sequences()) {
      if (sequence.sequence_id() == 1) versions.insert(step.plan_version());
    }
  }
  EXPECT_EQ(versions.size(), 1u);
}

class DeterministicInPlace : public SchedulerFixture {
 protected:
  void StartOn(const std::string& device) {
    machine_->device = device;
    machine_->attend_threads = 2;
    machine_->pool_tokens = 4 * kTailTokens;
    machine_->lane_costs.set_base_seconds(1e-6);
    for (const v1::Lane lane : {v1::LANE_RESIDENT, v1::LANE_FETCHED, v1::LANE_IN_PLACE}) {
      v1::LaneCost& cost = *machine_->lane_costs.add_lanes();
      cost.set_lane(lane);
      cost.set_seconds_per_byte(1e-9);
      cost.set_busy_seconds_per_byte(1e-9);
    }
    machine_->lane_costs.set_fetched_slowdown(1);
    machine_->lane_costs.set_in_place_slowdown(1);
    Start();
  }
  // Whether a plan of the request's has keys in place.
  bool PlansInPlace(bool deterministic) {
    auto request = MakeRequest(Prompt(3000), 20);
    request->deterministic = deterministic;
    const size_t before = Under(&FakeMachine::plans).size();
    const auto outcome = Submit(std::move(request));
    EXPECT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
    const std::vector<v1::Plan> plans = Under(&FakeMachine::plans);
    EXPECT_GT(plans.size(), before);
    for (size_t i = before; i < plans.size(); ++i) {
      for (const v1::LayerPlan& layer : plans[i].layers()) {
        for (const v1::LaneRange& range : layer.ranges()) {
          if (range.lane() == v1::LANE_IN_PLACE) return true;
        }
      }
    }
    return false;
  }
};

TEST_F(DeterministicInPlace, IsPlannedOnTheCpu) {
  StartOn("cpu");
  EXPECT_TRUE(PlansInPlace(true));
}

// Such keys have other bits there, their share is measured, and after a fault they are fetched.
TEST_F(DeterministicInPlace, IsNotPlannedBesideAGpu) {
  StartOn("NVIDIA H200");
  EXPECT_TRUE(PlansInPlace(false));
  EXPECT_FALSE(PlansInPlace(true));
  EXPECT_TRUE(PlansInPlace(false));
}

}  // namespace
}  // namespace headroom::coordinator
