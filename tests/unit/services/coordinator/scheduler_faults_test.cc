// Peers that fail, die and come back.
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

class SchedulerFaultsTest : public SchedulerFixture {};

TEST_F(SchedulerFaultsTest, ALostStreamLosesNoTokenAndChangesNone) {
  machine_->break_at_steps = {2, 7, 8, 20, 45};
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 5; ++i) outcomes.push_back(Submit(Prompt(150 + 100 * i, i), 80));
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_TRUE(outcomes[i]->status().ok()) << outcomes[i]->status();
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(150 + 100 * i, i), 80)) << i;
  }
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerFaultsTest, AFailedStepIsRunAgain) {
  machine_->fail_steps = {{1, 13}, {3, 4}, {11, 8}, {30, 13}};
  Start();
  auto request = MakeRequest(Prompt(300), 60);
  request->score_prompt = true;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 60));
  EXPECT_EQ(outcome->finished().prompt_logprobs_size(), 299);
}

TEST_F(SchedulerFaultsTest, AStepThatFailsAgainAndAgainEndsTheRequest) {
  for (int64_t step = 1; step < 100; ++step) machine_->fail_steps[step] = 3;
  Start();
  auto outcome = Submit(Prompt(300), 60);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(outcome->status()), "STEP_REFUSED");
}

TEST_F(SchedulerFaultsTest, ARestartedStoreServesWhatWasSealed) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(500), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = true;
  }
  ASSERT_TRUE(Eventually([this] { return !serving_.load(); }));
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = false;
    ++machine_->generation;
  }
  ASSERT_TRUE(Eventually([this] {
    const auto facts = scheduler_->facts();
    return serving_.load() && facts->store.generation() == 2;
  }));
  const int64_t computed = Under(&FakeMachine::chunk_rows);
  auto again = SubmitInSession("s", Prompt(500), 5);
  ASSERT_TRUE(again->WaitForEnd());
  EXPECT_EQ(again->finished().usage().cached_tokens(), 448);
  EXPECT_EQ(Under(&FakeMachine::chunk_rows) - computed, 52);
  EXPECT_EQ(again->tokens(), FakeAnswer(Prompt(500), 5));
}

TEST_F(SchedulerFaultsTest, DecodeGoesOnWhileTheStoreIsAwayAndAfterItsRestart) {
  machine_->step_time = absl::Milliseconds(4);
  Start();
  auto outcome = Submit(Prompt(300), 700);
  ASSERT_TRUE(outcome->WaitForTokens(20));
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = true;
  }
  ASSERT_TRUE(Eventually([this] { return !serving_.load(); }));
  const size_t before = outcome->tokens().size();
  ASSERT_TRUE(outcome->WaitForTokens(before + 20)) << "extents were leased ahead";
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = false;
    ++machine_->generation;
  }
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 700));
}

TEST_F(SchedulerFaultsTest, AStoreThatRestartsUnseenHoldsUpNobodyForLong) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto outcome = Submit(Prompt(300), 900);
  ASSERT_TRUE(outcome->WaitForTokens(20));
  {
    MutexLock lock(&machine_->mutex);
    ++machine_->generation;  // the next lease finds a store that knows no model
  }
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 900));
}

TEST_F(SchedulerFaultsTest, AStoreThatLostEverythingCostsARecomputation) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(500), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->stored.clear();
    machine_->extents.clear();
    ++machine_->generation;
  }
  ASSERT_TRUE(Eventually([this] { return scheduler_->facts()->store.generation() == 2; }));
  auto again = SubmitInSession("s", Prompt(500), 5);
  ASSERT_TRUE(again->WaitForEnd());
  EXPECT_EQ(again->finished().usage().cached_tokens(), 0);
  EXPECT_EQ(again->tokens(), FakeAnswer(Prompt(500), 5));
}

TEST_F(SchedulerFaultsTest, AStoreThatStaysAwayEndsOnlyWhoNeedsItsExtents) {
  machine_->step_time = absl::Milliseconds(2);
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(300);
  Start(options);
  auto has_enough = Submit(Prompt(200), 100);
  ASSERT_TRUE(has_enough->WaitForTokens(1));
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = true;
  }
  auto needs = Submit(Prompt(300), 5);
  ASSERT_TRUE(needs->WaitForEnd());
  EXPECT_EQ(needs->status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(needs->status()), "PEER_LOST");
  ASSERT_TRUE(has_enough->WaitForEnd());
  EXPECT_TRUE(has_enough->status().ok()) << has_enough->status();
  EXPECT_EQ(has_enough->tokens(), FakeAnswer(Prompt(200), 100));
}

// What ended while the store was away is not released, and the queue waits for it.
TEST_F(SchedulerFaultsTest, AStoreThatStaysAwayEndsWhoWaits) {
  machine_->step_time = absl::Milliseconds(2);
  machine_->host_tokens = 1024;
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(300);
  Start(options);
  auto runs = Submit(Prompt(600), 40);
  ASSERT_TRUE(runs->WaitForTokens(1));
  auto waits = Submit(Prompt(600, 2), 40);
  auto behind = Submit(Prompt(10), 1);
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = true;
  }
  for (const auto& outcome : {waits, behind}) {
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->status().code(), absl::StatusCode::kUnavailable) << outcome->status();
    EXPECT_EQ(ReasonOf(outcome->status()), "PEER_LOST");
  }
}

// It has room enough, but the store has not heard that its session goes on elsewhere.
TEST_F(SchedulerFaultsTest, AStoreThatStaysAwayEndsWhoWaitsForATruncation) {
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(300);
  Start(options);
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 20)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->lost_truncations = 1000;
    machine_->store_away = true;
  }
  std::vector<int32_t> other = Prompt(800);
  other[600] = (other[600] + 1) % kFakeVocab;
  auto diverged = SubmitInSession("s", other, 20);
  ASSERT_TRUE(diverged->WaitForEnd());
  EXPECT_EQ(ReasonOf(diverged->status()), "PEER_LOST") << diverged->status();
}

// A truncation is told to a store that knows no model yet: it is not the end of the session's request.
TEST_F(SchedulerFaultsTest, ATruncationOutlivesTheStoreThatItWasMeantFor) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 20)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->stored.clear();
    machine_->extents.clear();
    ++machine_->generation;
  }
  std::vector<int32_t> other = Prompt(5000);
  other[600] = (other[600] + 1) % kFakeVocab;
  auto diverged = SubmitInSession("s", other, 20);
  ASSERT_TRUE(diverged->WaitForEnd());
  EXPECT_TRUE(diverged->status().ok()) << diverged->status();
  EXPECT_EQ(diverged->tokens(), FakeAnswer(other, 20));
}

// Its calls are refused from then on: it binds the store again, and nothing is lost.
TEST_F(SchedulerFaultsTest, AStoreThatAnotherHasBoundIsBoundAgain) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto outcome = Submit(Prompt(300), 600);
  ASSERT_TRUE(outcome->WaitForTokens(10));
  {
    MutexLock lock(&machine_->mutex);
    machine_->bound_by_another = true;
  }
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 600));
  EXPECT_FALSE(Under(&FakeMachine::bound_by_another));
  EXPECT_GE(Under(&FakeMachine::streams), 2);
}

TEST_F(SchedulerFaultsTest, WhatCameWhileTheWorkerWasAwayIsJudgedWhenItIsBack) {
  machine_->pool_tokens = 512;
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto runs = Submit(Prompt(20), 50);
  ASSERT_TRUE(runs->WaitForTokens(1));
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = true;
  }
  ASSERT_TRUE(Eventually([this] { return !serving_.load(); }));
  auto request = MakeRequest(Prompt(1000), 10);
  request->placement.automatic = false;
  request->placement.shares = {1, 0, 0};
  auto never_fits = Submit(std::move(request));
  auto behind = Submit(Prompt(10), 3);
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = false;
  }
  ASSERT_TRUE(never_fits->WaitForEnd());
  EXPECT_EQ(ReasonOf(never_fits->status()), "DOES_NOT_FIT");
  ASSERT_TRUE(behind->WaitForEnd());
  EXPECT_EQ(behind->tokens(), FakeAnswer(Prompt(10), 3));
}

TEST_F(SchedulerFaultsTest, PeersThatStayAwayEndTheRequests) {
  machine_->step_time = absl::Milliseconds(5);
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(300);
  Start(options);
  const auto job = [this] {
    auto request = MakeRequest(Prompt(300), 5000);
    request->id = "job";
    return request;
  };
  auto outcome = Submit(job());
  ASSERT_TRUE(outcome->WaitForTokens(3));
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = true;
  }
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome->status()), "PEER_LOST");
  // Whoever tries again, as it was told, is told the same: its id is free, though the worker has the sequence still.
  EXPECT_TRUE(Eventually([&] {
    auto again = Submit(job());
    return again->WaitForEnd() && ReasonOf(again->status()) == "PEER_LOST";
  }));
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = false;
  }
  EXPECT_TRUE(NothingStored()) << "what it had is freed once the worker is back";
}

TEST_F(SchedulerFaultsTest, WhatAnEarlierCoordinatorLeftIsFreed) {
  {
    FakeStoreClient store(machine_);
    ASSERT_TRUE(store.BindModel({}, {}, false).ok());
    ASSERT_TRUE(store.AllocateRun(77, 0, 64).ok());
  }
  Start();
  EXPECT_TRUE(NothingStored());
  auto outcome = Submit(Prompt(300), 5);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 5));
}

}  // namespace
}  // namespace headroom::coordinator
