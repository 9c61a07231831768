// Keys in place that do not come.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

// Of a store that attends, with two steps of a kind in flight whenever there are so many.
class SchedulerInPlaceTest : public SchedulerFixture {
 protected:
  SchedulerInPlaceTest() {
    machine_->attend_threads = 1;
    machine_->step_time = absl::Milliseconds(1);
  }
  // The `nth` step from now on is discarded. REQUIRES: nothing runs.
  void DiscardNext(int64_t nth) {
    MutexLock lock(&machine_->mutex);
    machine_->discard_steps.insert(machine_->steps + nth);
  }
  std::vector<v1::StepRequest> SentSince(size_t begin) {
    std::vector<v1::StepRequest> sent = Under(&FakeMachine::sent);
    sent.erase(sent.begin(), sent.begin() + static_cast<ptrdiff_t>(begin));
    return sent;
  }
};

// Three chunks, then eleven tokens: whichever step it is, with what has been sent after it.
TEST_F(SchedulerInPlaceTest, ADiscardedStepIsRunAgainAndNoTokenChanges) {
  Start();
  for (int64_t nth = 1; nth <= 14; ++nth) {
    const int64_t before = Under(&FakeMachine::discarded);
    DiscardNext(nth);
    auto outcome = Submit(Prompt(300, static_cast<int32_t>(nth)), 12);
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
    EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300, static_cast<int32_t>(nth)), 12)) << nth;
    EXPECT_EQ(outcome->finished().usage().completion_tokens(), 12);
    EXPECT_TRUE(NothingStored());
    EXPECT_GT(Under(&FakeMachine::discarded), before) << nth;
  }
  EXPECT_EQ(Under(&FakeMachine::streams), 1) << "nothing was lost, so nothing is connected anew";
}

TEST_F(SchedulerInPlaceTest, WhatWasSentAheadOfADiscardedTokenIsRunAgainWithItsId) {
  machine_->step_time = absl::Milliseconds(25);
  Start();
  DiscardNext(6);  // after three chunks and two tokens
  auto outcome = Submit(Prompt(300), 7);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 7));
  EXPECT_EQ(Under(&FakeMachine::discarded), 2) << "the step and the one ahead of it";
  // Position 302 is computed twice, and 303; the second time 302's token is known.
  std::map<int64_t, std::vector<int>> ids_at;
  for (const v1::StepRequest& step : SentSince(0)) {
    for (const v1::StepSequence& sequence : step.sequences()) {
      ids_at[sequence.first_pos()].push_back(sequence.token_ids_size());
    }
  }
  EXPECT_EQ(ids_at[301].size(), 1u);
  EXPECT_EQ(ids_at[302], (std::vector<int>{0, 1}));
  EXPECT_EQ(ids_at[303], (std::vector<int>{0, 0}));
  EXPECT_EQ(ids_at[304].size(), 1u);
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

TEST_F(SchedulerInPlaceTest, ADiscardedChunkIsRunAgainAndScoredOnce) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  const std::vector<int32_t> prompt = Prompt(500);
  for (int64_t nth = 1; nth <= 9; ++nth) {
    DiscardNext(nth);
    auto request = MakeRequest(prompt, 3);
    request->score_prompt = true;  // in chunks of 63: the worker has 64 results a step
    auto outcome = Submit(std::move(request));
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
    EXPECT_EQ(outcome->tokens(), FakeAnswer(prompt, 3));
    const v1::Finished finished = outcome->finished();
    ASSERT_EQ(finished.prompt_logprobs_size(), 499) << nth;
    for (int i = 0; i < 499; ++i) {
      const std::vector<int32_t> prefix(prompt.begin(), prompt.begin() + i + 1);
      EXPECT_EQ(finished.prompt_logprobs(i).token_id(), prompt[i + 1]);
      EXPECT_EQ(finished.prompt_logprobs(i).logprob(), -FakeNextToken(prefix));
    }
  }
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

// Chunks that leave nothing of what is before them in the tail.
TEST_F(SchedulerInPlaceTest, ADiscardedChunkThatIsLongerThanTheTailIsRunAgain) {
  machine_->max_chunk_tokens = 512;
  Start();
  for (int64_t nth = 1; nth <= 7; ++nth) {
    DiscardNext(nth);
    auto request = MakeRequest(Prompt(1500), 5);
    request->chunk_tokens = 400;  // that end inside a block
    auto outcome = Submit(std::move(request));
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
    EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(1500), 5)) << nth;
  }
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

TEST_F(SchedulerInPlaceTest, ManyRequestsAtOnceDoNotMixWhenStepsAreDiscarded) {
  for (int64_t step = 3; step < 4000; step += 5) machine_->discard_steps.insert(step);
  for (int64_t step = 100; step < 120; ++step) machine_->discard_steps.insert(step);
  machine_->step_time = absl::ZeroDuration();
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 16; ++i) outcomes.push_back(Submit(Prompt(10 + 37 * i, i), 40 + i));
  for (int i = 0; i < 16; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_TRUE(outcomes[i]->status().ok()) << outcomes[i]->status();
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(10 + 37 * i, i), 40 + i)) << i;
  }
  EXPECT_GT(Under(&FakeMachine::discarded), 20);
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
  EXPECT_TRUE(NothingStored());
}

// A discarded step seals nothing that counts: what a session keeps is right, and commits are too.
TEST_F(SchedulerInPlaceTest, ASessionKeepsOnlyWhatWasNotDiscarded) {
  Start();
  for (int64_t nth = 1; nth <= 8; ++nth) {
    const std::string id = absl::StrCat("s", nth);
    DiscardNext(nth);
    std::vector<int32_t> tokens = Prompt(315, static_cast<int32_t>(nth));
    auto first = SubmitInSession(id, tokens, 8);  // a block ends at its fifth token
    ASSERT_TRUE(first->WaitForEnd());
    EXPECT_EQ(first->tokens(), FakeAnswer(tokens, 8));
    ASSERT_TRUE(IdleSession(id));
    const std::vector<int32_t> answer = first->tokens();
    tokens.insert(tokens.end(), answer.begin(), answer.end());
    auto second = SubmitInSession(id, tokens, 5);
    ASSERT_TRUE(second->WaitForEnd());
    EXPECT_EQ(second->finished().usage().cached_tokens(), 320);
    EXPECT_EQ(second->tokens(), FakeAnswer(tokens, 5)) << nth;
    ASSERT_TRUE(IdleSession(id));
  }
}

TEST_F(SchedulerInPlaceTest, ARequestThatIsCancelledWhileItIsTakenBackEndsCleanly) {
  machine_->step_time = absl::Milliseconds(40);
  Start();
  for (const bool cancel : {true, false}) {
    // A chunk with another in flight behind it, or a token.
    for (const int64_t nth : {int64_t{2}, int64_t{6}}) {
      const int64_t before = Under(&FakeMachine::discarded);
      DiscardNext(nth);
      auto request = MakeRequest(Prompt(500), 1000);
      const std::string id = request->id;
      auto outcome = Submit(std::move(request));
      ASSERT_TRUE(Eventually([&] { return Under(&FakeMachine::discarded) > before; }));
      if (cancel) {
        scheduler_->Cancel(id);
      } else {
        scheduler_->Abort(id);
      }
      ASSERT_TRUE(outcome->WaitForEnd());
      EXPECT_EQ(outcome->status().code(),
                cancel ? absl::StatusCode::kCancelled : absl::StatusCode::kOk);
      const std::vector<int32_t> tokens = outcome->tokens();
      EXPECT_EQ(tokens, FakeAnswer(Prompt(500), static_cast<int64_t>(tokens.size())));
      EXPECT_TRUE(NothingStored()) << "the worker has closed it, the store has freed it";
      EXPECT_EQ(outcome->tokens().size(), tokens.size()) << "nothing comes after the end";
    }
  }
  auto after = Submit(Prompt(300), 10);
  ASSERT_TRUE(after->WaitForEnd());
  EXPECT_EQ(after->tokens(), FakeAnswer(Prompt(300), 10));
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

// A stream that breaks in between: everything is opened anew, and nothing waits for what is lost.
TEST_F(SchedulerInPlaceTest, AStreamThatBreaksWhileARequestIsTakenBackLosesNothing) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->discard_steps = {6, 20, 40};
  machine_->break_at_steps = {7, 22};
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 3; ++i) outcomes.push_back(Submit(Prompt(300 + 10 * i, i), 40));
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_TRUE(outcomes[i]->status().ok()) << outcomes[i]->status();
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(300 + 10 * i, i), 40)) << i;
  }
  EXPECT_EQ(Under(&FakeMachine::streams), 3);
}

// It has not failed: however often, the request goes on.
TEST_F(SchedulerInPlaceTest, AStepThatIsDiscardedAgainAndAgainIsNotGivenUp) {
  for (int64_t step = 4; step < 40; ++step) machine_->discard_steps.insert(step);
  Start();
  auto outcome = Submit(Prompt(300), 10);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 10));
  EXPECT_GE(Under(&FakeMachine::discarded), 36);
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

// Steps that were discarded are not among those that an explanation counts.
TEST_F(SchedulerInPlaceTest, ExplainsEveryStepThatCountsOnce) {
  Start();
  DiscardNext(5);
  auto request = MakeRequest(Prompt(300), 10);
  request->explain = true;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->finished().explanation().steps(), 3 + 9);
  EXPECT_EQ(outcome->finished().explanation().prefill_lanes(0).bytes(), 300);
  EXPECT_EQ(outcome->finished().explanation().decode_lanes(0).bytes(), 900);
}

// At once would be too soon for a store that is slow, and the more so the second time. Several
// steps are discarded with each lane.
TEST_F(SchedulerInPlaceTest, TheLaneIsOpenedAgainAfterAPause) {
  Start();
  EXPECT_EQ(Under(&FakeMachine::mailboxes_attached), 1) << "it is there before the first step";
  EXPECT_EQ(Under(&FakeMachine::mailboxes), 1);
  const absl::Duration pauses[] = {absl::Milliseconds(500), absl::Seconds(1), absl::Seconds(2)};
  for (int round = 0; round < 3; ++round) {
    DiscardNext(5);
    const absl::Time begin = absl::Now();
    ASSERT_TRUE(Submit(Prompt(300), 10)->WaitForEnd());
    ASSERT_TRUE(Eventually([&] { return Under(&FakeMachine::mailboxes_attached) == 2 + round; }));
    EXPECT_GE(absl::Now() - begin, pauses[round]);
    EXPECT_LT(absl::Now() - begin, absl::Seconds(8));
    EXPECT_EQ(Under(&FakeMachine::mailboxes), 2 + round) << "of two steps, one lane was lost";
  }
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

TEST_F(SchedulerInPlaceTest, ALaneThatCannotBeOpenedCostsSpeedOnlyAndIsTriedAgain) {
  machine_->refuse_mailboxes = 1;
  Start();
  auto outcome = Submit(Prompt(300), 10);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(Under(&FakeMachine::mailboxes_attached), 0);
  EXPECT_TRUE(Eventually([this] { return Under(&FakeMachine::mailboxes_attached) == 1; }));
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

TEST_F(SchedulerInPlaceTest, ALaneThatCannotBeOpenedWithANewStreamIsTriedAgain) {
  Start();
  EXPECT_EQ(Under(&FakeMachine::mailboxes_attached), 1);
  {
    MutexLock lock(&machine_->mutex);
    machine_->refuse_mailboxes = 1;
    machine_->break_at_steps.insert(machine_->steps + 5);
  }
  auto outcome = Submit(Prompt(300), 10);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 10));
  EXPECT_EQ(Under(&FakeMachine::streams), 2);
  EXPECT_TRUE(Eventually([this] { return Under(&FakeMachine::mailboxes_attached) == 2; }));
  EXPECT_EQ(Under(&FakeMachine::mailboxes), 1) << "the worker still has it";
}

TEST_F(SchedulerInPlaceTest, ARestartedStoreGetsAMailboxOfItsGeneration) {
  Start();
  ASSERT_TRUE(Eventually([this] { return Under(&FakeMachine::mailboxes_attached) == 1; }));
  {
    MutexLock lock(&machine_->mutex);
    ++machine_->generation;
  }
  ASSERT_TRUE(Eventually([this] { return Under(&FakeMachine::mailboxes_attached) == 2; }));
  EXPECT_EQ(Under(&FakeMachine::mailbox_file), "mailbox-2-2");
}

TEST_F(SchedulerInPlaceTest, AStoreThatDoesNotAttendIsOfferedNoMailbox) {
  machine_->attend_threads = 0;
  Start();
  DiscardNext(5);
  auto outcome = Submit(Prompt(300), 10);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(300), 10));
  absl::SleepFor(absl::Milliseconds(1200));
  EXPECT_EQ(Under(&FakeMachine::mailboxes), 0);
}

}  // namespace
}  // namespace headroom::coordinator
