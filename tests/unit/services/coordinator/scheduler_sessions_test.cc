// Sessions, and the prefixes that later requests find.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

class SchedulerSessionsTest : public SchedulerFixture {};

TEST_F(SchedulerSessionsTest, ASessionContinuesFromItsLongestCommonPrefix) {
  Start();
  std::vector<int32_t> tokens = Prompt(500);
  auto first = SubmitInSession("s", tokens, 60);
  ASSERT_TRUE(first->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  const int64_t computed = Under(&FakeMachine::chunk_rows);
  const std::vector<int32_t> answer = first->tokens();
  tokens.insert(tokens.end(), answer.begin(), answer.end());
  const std::vector<int32_t> more = Prompt(100, 9);
  tokens.insert(tokens.end(), more.begin(), more.end());
  auto second = SubmitInSession("s", tokens, 20);
  ASSERT_TRUE(second->WaitForEnd());
  EXPECT_EQ(second->tokens(), FakeAnswer(tokens, 20));
  // 559 of the 560 tokens have keys, 512 of them in whole blocks.
  EXPECT_EQ(second->finished().usage().cached_tokens(), 512);
  EXPECT_EQ(Under(&FakeMachine::chunk_rows) - computed, 660 - 512);
}

TEST_F(SchedulerSessionsTest, ASessionThatDivergesForgetsWhatFollows) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 20)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  std::vector<int32_t> other = Prompt(1000);
  other[300] = (other[300] + 1) % kFakeVocab;
  auto diverged = SubmitInSession("s", other, 20);
  ASSERT_TRUE(diverged->WaitForEnd());
  EXPECT_EQ(diverged->finished().usage().cached_tokens(), 256);
  EXPECT_EQ(diverged->tokens(), FakeAnswer(other, 20));
  ASSERT_TRUE(IdleSession("s"));
  auto back = SubmitInSession("s", Prompt(1000), 20);
  ASSERT_TRUE(back->WaitForEnd());
  EXPECT_EQ(back->finished().usage().cached_tokens(), 256);
  EXPECT_EQ(back->tokens(), FakeAnswer(Prompt(1000), 20));
}

// The store has still what follows, also of another length: extents that would not fit what it has.
TEST_F(SchedulerSessionsTest, ATruncationThatIsLostIsToldAgain) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 20)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->lost_truncations = 2;
  }
  std::vector<int32_t> other = Prompt(5000);
  other[100] = (other[100] + 1) % kFakeVocab;
  auto diverged = SubmitInSession("s", other, 20);
  ASSERT_TRUE(diverged->WaitForEnd());
  EXPECT_TRUE(diverged->status().ok()) << diverged->status();
  EXPECT_EQ(diverged->tokens(), FakeAnswer(other, 20));
  EXPECT_EQ(Under(&FakeMachine::lost_truncations), 0);
}

// That is this program's mistake; the session is not to be of no use for ever.
TEST_F(SchedulerSessionsTest, ATruncationThatIsRefusedCostsTheSession) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 20)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  {
    MutexLock lock(&machine_->mutex);
    machine_->refuses_truncations = true;
  }
  auto diverged = SubmitInSession("s", Prompt(2000, 7), 20);
  ASSERT_TRUE(diverged->WaitForEnd());
  EXPECT_EQ(ReasonOf(diverged->status()), "STORE_REFUSED");
  EXPECT_TRUE(NothingStored());
  auto anew = SubmitInSession("s", Prompt(2000, 7), 20);
  ASSERT_TRUE(anew->WaitForEnd());
  EXPECT_EQ(anew->tokens(), FakeAnswer(Prompt(2000, 7), 20));
}

TEST_F(SchedulerSessionsTest, TheSamePromptAgainComputesOnlyItsLastBlock) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(640), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  auto again = SubmitInSession("s", Prompt(640), 5);
  ASSERT_TRUE(again->WaitForEnd());
  EXPECT_EQ(again->finished().usage().cached_tokens(), 576) << "the last prompt token is computed";
  EXPECT_EQ(again->tokens(), FakeAnswer(Prompt(640), 5));
}

TEST_F(SchedulerSessionsTest, AnotherSaltOrABypassSharesNothing) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  auto request = MakeRequest(Prompt(300), 5);
  request->session_id = "s";
  request->cache_salt = "tenant";
  auto salted = Submit(std::move(request));
  ASSERT_TRUE(salted->WaitForEnd());
  EXPECT_EQ(salted->finished().usage().cached_tokens(), 0);
  ASSERT_TRUE(IdleSession("s"));
  request = MakeRequest(Prompt(300), 5);
  request->session_id = "s";
  request->cache_salt = "tenant";
  request->bypass_prefix_cache = true;
  auto bypassed = Submit(std::move(request));
  ASSERT_TRUE(bypassed->WaitForEnd());
  EXPECT_EQ(bypassed->finished().usage().cached_tokens(), 0);
  EXPECT_EQ(bypassed->tokens(), FakeAnswer(Prompt(300), 5));
}

TEST_F(SchedulerSessionsTest, ABusySessionRefusesASecondRequest) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto first = SubmitInSession("s", Prompt(100), 2000);
  ASSERT_TRUE(first->WaitForTokens(1));
  auto second = SubmitInSession("s", Prompt(100), 5);
  ASSERT_TRUE(second->WaitForEnd());
  EXPECT_EQ(ReasonOf(second->status()), "SESSION_BUSY");
}

TEST_F(SchedulerSessionsTest, ADeletedSessionFreesItsExtents) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  EXPECT_GT(Under(&FakeMachine::stored).size(), 0u);
  std::atomic<bool> deleted{false};
  scheduler_->DeleteSession("s", [&](absl::Status status) { deleted.store(status.ok()); });
  EXPECT_TRUE(NothingStored());
  EXPECT_TRUE(deleted.load());
}

// The flush is posted before the worker can answer that it has closed the sequence.
TEST_F(SchedulerSessionsTest, AFlushDropsASessionAsSoonAsItsAnswerHasEnded) {
  Start();
  std::atomic<int32_t> dropped{-1};
  auto outcome = std::make_shared<Outcome>();
  outcome->on_finished = [&] {
    scheduler_->Flush([&](int32_t sessions) { dropped.store(sessions); });
  };
  auto request = MakeRequest(Prompt(300), 5);
  request->session_id = "s";
  ASSERT_TRUE(Submit(std::move(request), outcome)->WaitForEnd());
  EXPECT_TRUE(Eventually([&] { return dropped.load() != -1; }));
  EXPECT_EQ(dropped.load(), 1);
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerSessionsTest, ASessionGoesWhenItsTimeIsOver) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  scheduler_->UpdateSession("s", 50, std::nullopt, [](absl::StatusOr<v1::Session>) {});
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerSessionsTest, AnIdleSessionsKeysAreCommitted) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  EXPECT_TRUE(Eventually([this] {
    MutexLock lock(&machine_->mutex);
    return machine_->stored.size() == 1 && machine_->stored.begin()->second.sealed_tokens == 256;
  }));
}

}  // namespace
}  // namespace headroom::coordinator
