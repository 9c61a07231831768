#include "services/coordinator/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

class SchedulerTest : public SchedulerFixture {};

TEST_F(SchedulerTest, AnswersAsIfEveryTokenWereComputedAlone) {
  Start();
  for (const int64_t length : {1, 2, 63, 64, 65, 127, 128, 129, 1000}) {
    auto outcome = Submit(Prompt(length), 20);
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_TRUE(outcome->status().ok()) << outcome->status();
    EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(length), 20)) << length;
    EXPECT_EQ(outcome->finished().reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(outcome->finished().usage().prompt_tokens(), length);
    EXPECT_EQ(outcome->finished().usage().completion_tokens(), 20);
  }
  EXPECT_TRUE(NothingStored()) << "anonymous sequences leave nothing";
}

TEST_F(SchedulerTest, ChunksOfAnySizeGiveTheSameAnswer) {
  Start();
  for (const int64_t chunk : {1, 2, 7, 63, 64, 65, 128}) {
    auto request = MakeRequest(Prompt(400), 30);
    request->chunk_tokens = chunk;
    auto outcome = Submit(std::move(request));
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(400), 30)) << chunk;
  }
}

TEST_F(SchedulerTest, DecodesFarBeyondTheTail) {
  Start();
  auto outcome = Submit(Prompt(30), 1500);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(30), 1500));
}

TEST_F(SchedulerTest, ManyRequestsAtOnceDoNotMix) {
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 24; ++i) outcomes.push_back(Submit(Prompt(10 + 37 * i, i), 40 + i));
  for (int i = 0; i < 24; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_TRUE(outcomes[i]->status().ok()) << outcomes[i]->status();
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(10 + 37 * i, i), 40 + i)) << i;
  }
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerTest, SendsTheNextTokensStepBeforeTheLastHasReturned) {
  machine_->steps_that_wait = 19;  // of 20: the last has none after it
  Start();
  auto outcome = Submit(Prompt(5), 20);
  ASSERT_TRUE(outcome->WaitForEnd()) << "a step waits for the answer of the one before it";
  int ahead = 0;
  for (const v1::StepRequest& step : Under(&FakeMachine::sent)) {
    for (const v1::StepSequence& sequence : step.sequences()) {
      if (sequence.token_ids().empty()) ++ahead;
    }
  }
  EXPECT_EQ(ahead, 19) << "all but the first token go out as 'the last drawn'";
}

TEST_F(SchedulerTest, OnlyThePromptWhereNoTokenIsWanted) {
  Start();
  auto outcome = Submit(Prompt(300), 0);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->tokens().empty());
  EXPECT_EQ(outcome->finished().usage().completion_tokens(), 0);
  EXPECT_EQ(outcome->finished().reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(SchedulerTest, ScoresEveryPromptTokenButTheFirst) {
  Start();
  auto request = MakeRequest(Prompt(300), 2);
  request->score_prompt = true;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  const v1::Finished finished = outcome->finished();
  ASSERT_EQ(finished.prompt_logprobs_size(), 299);
  const std::vector<int32_t> prompt = Prompt(300);
  for (int i = 0; i < 299; ++i) {
    EXPECT_EQ(finished.prompt_logprobs(i).token_id(), prompt[i + 1]);
    const std::vector<int32_t> prefix(prompt.begin(), prompt.begin() + i + 1);
    EXPECT_EQ(finished.prompt_logprobs(i).logprob(), -FakeNextToken(prefix));
  }
}

// ---------------------------------------------------------------- stopping

TEST_F(SchedulerTest, StopsAtEosOnceMinTokensAreThere) {
  Start();
  const std::vector<int32_t> answer = FakeAnswer(Prompt(50), 10);
  auto request = MakeRequest(Prompt(50), 10);
  request->eos_token_ids = {answer[4]};
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->finished().reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(outcome->finished().stop().eos_token_id(), answer[4]);
  EXPECT_EQ(outcome->tokens().size(), 5u);
  EXPECT_EQ(outcome->text().find(absl::StrCat(answer[4], ",")), std::string::npos);

  request = MakeRequest(Prompt(50), 10);
  request->eos_token_ids = {answer[4]};
  request->min_tokens = 6;
  outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->tokens().size(), 10u);
}

TEST_F(SchedulerTest, StopsAtAStringThatSpansTokens) {
  Start();
  const std::vector<int32_t> answer = FakeAnswer(Prompt(50), 10);
  const std::string stop = absl::StrCat(answer[3] % 10, ",", answer[4] / 100);
  auto request = MakeRequest(Prompt(50), 10);
  request->stop_strings = {"nowhere", stop};
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->finished().stop().stop_string(), stop);
  EXPECT_EQ(outcome->tokens().size(), 5u);
  const std::string all =
      absl::StrCat(answer[0], ",", answer[1], ",", answer[2], ",", answer[3], ",", answer[4], ",");
  EXPECT_EQ(outcome->text(), all.substr(0, all.find(stop)));
}

TEST_F(SchedulerTest, TheTimeLimitEndsWithWhatThereIs) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto request = MakeRequest(Prompt(50), 100000);
  request->max_tokens = 10000;
  request->time_limit = absl::Milliseconds(200);
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok());
  EXPECT_EQ(outcome->finished().reason(), v1::FINISH_REASON_TIME_LIMIT);
  EXPECT_GT(outcome->tokens().size(), 0u);
}

TEST_F(SchedulerTest, TheDeadlineIsAnError) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto request = MakeRequest(Prompt(50), 10000);
  request->deadline = absl::Now() + absl::Milliseconds(100);
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerTest, ACancelledRequestFreesItsMemory) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto request = MakeRequest(Prompt(500), 5000);
  const std::string id = request->id;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForTokens(3));
  scheduler_->Cancel(id);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(NothingStored());
}

// Of a long prompt two chunks are in flight: they are not run. Behind a short one's only chunk a token is, in
// a step with another request's, which is run again for that.
TEST_F(SchedulerTest, AChunkInFlightIsAbandonedWithItsRequest) {
  machine_->step_time = absl::Milliseconds(20);
  Start();
  auto other = Submit(Prompt(100, 2), 60);
  ASSERT_TRUE(other->WaitForTokens(1));
  for (int round = 0; round < 6; ++round) {
    const int64_t before = Under(&FakeMachine::abandoned);
    // All of it one chunk, with a token sent behind it; or many.
    auto request = MakeRequest(Prompt(round % 2 == 0 ? 128 : 5000), 100);
    const std::string id = request->id;
    const size_t sent = Under(&FakeMachine::sent).size();
    auto outcome = Submit(std::move(request));
    ASSERT_TRUE(Eventually([&] {
      MutexLock lock(&machine_->mutex);
      return std::any_of(machine_->sent.begin() + sent, machine_->sent.end(), [](const auto& step) {
        return step.sequences_size() == 1 && step.sequences(0).token_ids_size() == 128;
      });
    }));
    scheduler_->Cancel(id);
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->status().code(), absl::StatusCode::kCancelled);
    if (round % 2 == 1) {
      EXPECT_TRUE(Eventually([&] { return Under(&FakeMachine::abandoned) > before; }));
    }
  }
  ASSERT_TRUE(other->WaitForEnd());
  EXPECT_EQ(other->tokens(), FakeAnswer(Prompt(100, 2), 60));
  EXPECT_TRUE(NothingStored());
  EXPECT_EQ(Under(&FakeMachine::streams), 1);
}

TEST_F(SchedulerTest, AnOlderWorkerIsNotAskedToAbandon) {
  machine_->worker_revision = 1;
  machine_->step_time = absl::Milliseconds(20);
  Start();
  auto request = MakeRequest(Prompt(5000), 100);
  const std::string id = request->id;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(Eventually([&] { return Under(&FakeMachine::chunk_rows) > 0; }));
  scheduler_->Cancel(id);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(NothingStored());
  EXPECT_EQ(Under(&FakeMachine::abandoned), 0);
}

TEST_F(SchedulerTest, AnAbortedRequestEndsAsCancelled) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto request = MakeRequest(Prompt(500), 5000);
  const std::string id = request->id;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForTokens(3));
  scheduler_->Abort(id);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok());
  EXPECT_EQ(outcome->finished().reason(), v1::FINISH_REASON_CANCELLED);
  scheduler_->Abort(id);  // again: success
}

// ---------------------------------------------------------------- clients

TEST_F(SchedulerTest, ASlowClientPausesOnlyItsOwnRequest) {
  Start();
  auto request = MakeRequest(Prompt(100), 3000);
  auto slow = std::make_shared<Outcome>();
  slow->takes = false;
  ASSERT_TRUE(SubmitTo(slow, *request).ok());
  auto other = Submit(Prompt(100, 2), 100);
  ASSERT_TRUE(other->WaitForEnd());
  EXPECT_EQ(slow->tokens().size(), 0u);
  slow->takes = true;
  scheduler_->Wake();
  ASSERT_TRUE(slow->WaitForEnd());
  EXPECT_EQ(slow->tokens(), FakeAnswer(Prompt(100), 3000));
}

TEST_F(SchedulerTest, AClientThatNeverTakesIsDropped) {
  SchedulerOptions options;
  options.slow_client_timeout = absl::Milliseconds(200);
  Start(options);
  auto outcome = std::make_shared<Outcome>();
  outcome->takes = false;
  const auto request = MakeRequest(Prompt(100), 3000);
  ASSERT_TRUE(SubmitTo(outcome, *request).ok());
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(ReasonOf(outcome->status()), "SLOW_CLIENT");
  EXPECT_TRUE(NothingStored());
}

// Its prompt is being tokenized.
TEST_F(SchedulerTest, AReservedRequestCanBeAbortedAndCancelled) {
  Start();
  for (const bool abort : {true, false}) {
    const auto request = MakeRequest(Prompt(10), 1000);
    const auto outcome = std::make_shared<Outcome>();
    ASSERT_TRUE(scheduler_->Reserve(request->id, 1).ok());
    abort ? scheduler_->Abort(request->id) : scheduler_->Cancel(request->id);
    ASSERT_TRUE(scheduler_->Submit(*request, outcome, [] { return nullptr; }).ok());
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->status().code(), abort ? absl::StatusCode::kOk : absl::StatusCode::kCancelled);
    EXPECT_EQ(outcome->finished().reason() == v1::FINISH_REASON_CANCELLED, abort);
    EXPECT_TRUE(scheduler_->Reserve(request->id, 1).ok()) << "the id is free";
    scheduler_->GiveUp(request->id);
  }
}

TEST_F(SchedulerTest, AReservedRequestHasItsPlaceAndHoldsUpADrain) {
  SchedulerOptions options;
  options.max_queue = 2;
  Start(options);
  ASSERT_TRUE(scheduler_->Reserve("a", 1).ok());
  EXPECT_EQ(ReasonOf(scheduler_->Reserve("a", 1)), "REQUEST_ID_IN_USE");
  EXPECT_EQ(ReasonOf(scheduler_->Reserve("b", 2)), "QUEUE_FULL");
  EXPECT_TRUE(scheduler_->Reserve("b", 1).ok());
  scheduler_->GiveUp("b");
  std::atomic<bool> drained{false};
  scheduler_->Drain([&] { drained.store(true); });
  EXPECT_EQ(ReasonOf(scheduler_->Reserve("c", 1)), "DRAINING");
  absl::SleepFor(absl::Milliseconds(200));
  EXPECT_FALSE(drained.load());
  auto request = MakeRequest(Prompt(10), 5);
  request->id = "a";
  const auto outcome = std::make_shared<Outcome>();
  ASSERT_TRUE(scheduler_->Submit(*request, outcome, [] { return nullptr; }).ok());
  EXPECT_TRUE(Eventually([&] { return drained.load(); }));
  EXPECT_TRUE(outcome->done());
}

TEST_F(SchedulerTest, StoppingAnswersADrain) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto outcome = Submit(Prompt(10), 1000);
  ASSERT_TRUE(outcome->WaitForTokens(1));
  std::atomic<bool> drained{false};
  scheduler_->Drain([&] { drained.store(true); });
  scheduler_->Stop();
  EXPECT_TRUE(drained.load());
  EXPECT_FALSE(scheduler_->Drain([] {}));
}

// An ended request is let go when the worker is back; nobody waits for that.
TEST_F(SchedulerTest, DrainsThoughTheWorkerIsAway) {
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(200);
  machine_->step_time = absl::Milliseconds(5);
  Start(options);
  auto outcome = Submit(Prompt(10), 1000);
  ASSERT_TRUE(outcome->WaitForTokens(1));
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = true;
    machine_->break_at_steps.insert(machine_->steps + 3);
  }
  std::atomic<bool> drained{false};
  scheduler_->Drain([&] { drained.store(true); });
  EXPECT_TRUE(Eventually([&] { return drained.load(); }));
  EXPECT_EQ(ReasonOf(outcome->status()), "PEER_LOST");
}

TEST_F(SchedulerTest, DrainingRefusesNewRequestsAndFinishesTheRunning) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto running = Submit(Prompt(100), 100);
  ASSERT_TRUE(running->WaitForTokens(1));
  std::atomic<bool> drained{false};
  scheduler_->Drain([&] { drained.store(true); });
  auto refused = Submit(Prompt(10), 1);
  EXPECT_EQ(ReasonOf(refused->status()), "DRAINING");
  EXPECT_TRUE(Eventually([&] { return drained.load(); }));
  EXPECT_TRUE(running->done());
  EXPECT_EQ(running->tokens(), FakeAnswer(Prompt(100), 100));
}

TEST_F(SchedulerTest, StoppingEndsEveryRequest) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->max_sequences = 1;
  Start();
  auto running = Submit(Prompt(100), 1000);
  auto waiting = Submit(Prompt(100), 1000);
  ASSERT_TRUE(running->WaitForTokens(1));
  scheduler_->Stop();
  EXPECT_EQ(ReasonOf(running->status()), "STOPPING");
  EXPECT_EQ(ReasonOf(waiting->status()), "STOPPING");
}

TEST_F(SchedulerTest, ExplainsWhatItsStepsDid) {
  Start();
  auto request = MakeRequest(Prompt(300), 10);
  request->explain = true;
  auto outcome = Submit(std::move(request));
  ASSERT_TRUE(outcome->WaitForEnd());
  const v1::Explanation explanation = outcome->finished().explanation();
  EXPECT_EQ(explanation.steps(), 3 + 9) << "three chunks draw the first token, nine steps the rest";
  ASSERT_EQ(explanation.prefill_lanes_size(), 1);
  EXPECT_EQ(explanation.prefill_lanes(0).bytes(), 300);
  EXPECT_EQ(explanation.decode_lanes(0).bytes(), 900);
  EXPECT_EQ(explanation.decode_lanes(0).kv_heads(), 2);
  EXPECT_EQ(explanation.device(), "fake");
  EXPECT_GT(explanation.plan_version(), 0u);
}

}  // namespace
}  // namespace headroom::coordinator
