#include "services/coordinator/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "tests/unit/services/coordinator/fake_peers.h"

namespace headroom::coordinator {
namespace {

// What became of a request.
class Outcome : public RequestSink {
 public:
  void OnAccepted() override {
    MutexLock lock(&mutex_);
    accepted_ = true;
  }
  void OnDelta(v1::Delta delta) override {
    MutexLock lock(&mutex_);
    for (const v1::TokenRecord& token : delta.tokens()) tokens_.push_back(token.token_id());
    text_ += delta.text();
    changed_.SignalAll();
  }
  void OnFinished(const absl::Status& status, v1::Finished finished) override {
    MutexLock lock(&mutex_);
    if (done_) ADD_FAILURE() << "finished twice";
    done_ = true;
    status_ = status;
    finished_ = std::move(finished);
    if (on_finished) on_finished();
    changed_.SignalAll();
  }
  bool CanTake() const override { return takes.load(); }

  // False if it takes longer than any of these tests may.
  bool WaitForEnd() {
    return WaitUntil([this] { return done_; });
  }
  bool WaitForTokens(size_t count) {
    return WaitUntil([this, count] { return done_ || tokens_.size() >= count; });
  }
  bool done() {
    MutexLock lock(&mutex_);
    return done_;
  }
  absl::Status status() {
    MutexLock lock(&mutex_);
    return status_;
  }
  v1::Finished finished() {
    MutexLock lock(&mutex_);
    return finished_;
  }
  std::vector<int32_t> tokens() {
    MutexLock lock(&mutex_);
    return tokens_;
  }
  std::string text() {
    MutexLock lock(&mutex_);
    return text_;
  }

  std::atomic<bool> takes{true};
  std::function<void()> on_finished;  // called under the lock

 private:
  template <typename Condition>
  bool WaitUntil(Condition condition) {
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    MutexLock lock(&mutex_);
    while (!condition() && absl::Now() < deadline) changed_.WaitFor(&mutex_, absl::Seconds(1));
    return condition();
  }

  Mutex mutex_;
  CondVar changed_;
  bool accepted_ = false;
  bool done_ = false;
  absl::Status status_;
  v1::Finished finished_;
  std::vector<int32_t> tokens_;
  std::string text_;
};

// Each token's text is its number and a comma.
class NumberDecoder : public TokenDecoder {
 public:
  std::string Push(int32_t token_id) override { return absl::StrCat(token_id, ","); }
  std::string Finish() override { return ""; }
};

std::vector<int32_t> Prompt(int64_t tokens, int32_t seed = 1) {
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < tokens; ++i) {
    prompt.push_back(static_cast<int32_t>((i * 7919 + seed * 104729) % kFakeVocab));
  }
  return prompt;
}

class SchedulerTest : public testing::Test {
 protected:
  void Start(SchedulerOptions options = {}) {
    scheduler_ = std::make_unique<Scheduler>(options, std::make_unique<FakeWorkerClient>(machine_),
                                             std::make_unique<FakeStoreClient>(machine_),
                                             [this](bool serving) { serving_.store(serving); });
    scheduler_->Start();
    ASSERT_TRUE(Eventually([this] { return serving_.load(); }));
  }
  void TearDown() override {
    if (scheduler_ != nullptr) scheduler_->Stop();
    EXPECT_EQ(machine_->violations(), std::vector<std::string>());
  }

  static std::unique_ptr<Request> MakeRequest(std::vector<int32_t> prompt, int64_t max_tokens) {
    static std::atomic<int> count{0};
    auto request = std::make_unique<Request>();
    request->id = absl::StrCat("request-", ++count);
    request->prompt = std::move(prompt);
    request->max_tokens = max_tokens;
    request->sampling.set_temperature(0);
    request->chunk_tokens = 128;
    request->arrival = absl::Now();
    return request;
  }
  std::shared_ptr<Outcome> Submit(std::unique_ptr<Request> request,
                                  std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>()) {
    const absl::Status status = scheduler_->Submit(
        *request, outcome, [] { return std::make_unique<NumberDecoder>(); });
    if (!status.ok()) outcome->OnFinished(status, v1::Finished());
    return outcome;
  }
  std::shared_ptr<Outcome> Submit(std::vector<int32_t> prompt, int64_t max_tokens) {
    return Submit(MakeRequest(std::move(prompt), max_tokens));
  }
  std::shared_ptr<Outcome> SubmitInSession(const std::string& session, std::vector<int32_t> prompt,
                                           int64_t max_tokens) {
    auto request = MakeRequest(std::move(prompt), max_tokens);
    request->session_id = session;
    return Submit(std::move(request));
  }
  template <typename Condition>
  static bool Eventually(Condition condition) {
    for (int i = 0; i < 2000; ++i) {
      if (condition()) return true;
      absl::SleepFor(absl::Milliseconds(10));
    }
    return condition();
  }
  template <typename T>
  T Under(T FakeMachine::* member) {
    MutexLock lock(&machine_->mutex);
    return (*machine_).*member;
  }
  bool NothingStored() {
    return Eventually([this] {
      MutexLock lock(&machine_->mutex);
      return machine_->stored.empty() && machine_->extents.empty();
    });
  }
  // A session's next request must find it idle.
  bool IdleSession(const std::string& id) {
    return Eventually([&] {
      std::atomic<int> state{0};
      scheduler_->GetSession(id, [&](absl::StatusOr<v1::Session> session) {
        state.store(session.ok() && !session->busy() ? 1 : 2);
      });
      Eventually([&] { return state.load() != 0; });
      return state.load() == 1;
    });
  }

  const std::shared_ptr<FakeMachine> machine_ = std::make_shared<FakeMachine>();
  std::atomic<bool> serving_{false};
  std::unique_ptr<Scheduler> scheduler_;
};

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

// ---------------------------------------------------------------- admission

TEST_F(SchedulerTest, RefusesWhatCanNeverFit) {
  machine_->host_tokens = 2048;
  Start();
  auto outcome = Submit(Prompt(100), 5000);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(outcome->status()), "DOES_NOT_FIT");
}

TEST_F(SchedulerTest, WaitsForHostMemoryInsteadOfOvercommitting) {
  machine_->host_tokens = 2048;
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 6; ++i) outcomes.push_back(Submit(Prompt(700, i), 300));
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(700, i), 300));
  }
}

TEST_F(SchedulerTest, AFullQueueSaysWhenToTryAgain) {
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

TEST_F(SchedulerTest, EachOfSeveralAnswersIsASequence) {
  Start();
  auto request = MakeRequest(Prompt(100), 20);
  request->n = 4;
  request->session_id = "kept";
  const auto answers = std::make_shared<Answers>(4);
  ASSERT_TRUE(scheduler_->Submit(*request, answers, [] { return nullptr; }).ok());
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

TEST_F(SchedulerTest, CancelEndsAnswersThatRunAndThatWait) {
  machine_->step_time = absl::Milliseconds(5);
  machine_->max_sequences = 2;
  Start();
  auto request = MakeRequest(Prompt(10), 1000);
  request->n = 4;
  const auto answers = std::make_shared<Answers>(4);
  ASSERT_TRUE(scheduler_->Submit(*request, answers, [] { return nullptr; }).ok());
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

TEST_F(SchedulerTest, EachAnswerTakesAPlaceInTheQueue) {
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
    return scheduler_->Submit(*request, std::make_shared<Answers>(n), [] { return nullptr; });
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

TEST_F(SchedulerTest, AnIdInUseIsRefused) {
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

TEST_F(SchedulerTest, InPlaceIsRefusedByAStoreThatDoesNotAttend) {
  Start();
  auto request = MakeRequest(Prompt(10), 1);
  request->placement.automatic = false;
  request->placement.shares = {0.5, 0, 0.5};
  auto outcome = Submit(std::move(request));
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(outcome->status().message(), "in place is not served by this store (attend threads 0)");
}

TEST_F(SchedulerTest, AnotherPlacementWaitsUntilTheRunningOneHasDrained) {
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

TEST_F(SchedulerTest, AResidentShareThatDoesNotFitIsRefusedWithTheNumbers) {
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

TEST_F(SchedulerTest, AutomaticPlansNeverPromiseMoreThanThePoolHolds) {
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

TEST_F(SchedulerTest, ADeterministicRequestKeepsItsPlan) {
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

class DeterministicInPlace : public SchedulerTest {
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

// ---------------------------------------------------------------- sessions

TEST_F(SchedulerTest, ASessionContinuesFromItsLongestCommonPrefix) {
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

TEST_F(SchedulerTest, ASessionThatDivergesForgetsWhatFollows) {
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

TEST_F(SchedulerTest, TheSamePromptAgainComputesOnlyItsLastBlock) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(640), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  auto again = SubmitInSession("s", Prompt(640), 5);
  ASSERT_TRUE(again->WaitForEnd());
  EXPECT_EQ(again->finished().usage().cached_tokens(), 576) << "the last prompt token is computed";
  EXPECT_EQ(again->tokens(), FakeAnswer(Prompt(640), 5));
}

TEST_F(SchedulerTest, AnotherSaltOrABypassSharesNothing) {
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

TEST_F(SchedulerTest, ABusySessionRefusesASecondRequest) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  auto first = SubmitInSession("s", Prompt(100), 2000);
  ASSERT_TRUE(first->WaitForTokens(1));
  auto second = SubmitInSession("s", Prompt(100), 5);
  ASSERT_TRUE(second->WaitForEnd());
  EXPECT_EQ(ReasonOf(second->status()), "SESSION_BUSY");
}

TEST_F(SchedulerTest, ADeletedSessionFreesItsExtents) {
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
TEST_F(SchedulerTest, AFlushDropsASessionAsSoonAsItsAnswerHasEnded) {
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

TEST_F(SchedulerTest, ASessionGoesWhenItsTimeIsOver) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  scheduler_->UpdateSession("s", 50, std::nullopt, [](absl::StatusOr<v1::Session>) {});
  EXPECT_TRUE(NothingStored());
}

TEST_F(SchedulerTest, AnIdleSessionsKeysAreCommitted) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(300), 5)->WaitForEnd());
  EXPECT_TRUE(Eventually([this] {
    MutexLock lock(&machine_->mutex);
    return machine_->stored.size() == 1 && machine_->stored.begin()->second.sealed_tokens == 256;
  }));
}

// ---------------------------------------------------------------- faults

TEST_F(SchedulerTest, ALostStreamLosesNoTokenAndChangesNone) {
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

TEST_F(SchedulerTest, AFailedStepIsRunAgain) {
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

TEST_F(SchedulerTest, AStepThatFailsAgainAndAgainEndsTheRequest) {
  for (int64_t step = 1; step < 100; ++step) machine_->fail_steps[step] = 3;
  Start();
  auto outcome = Submit(Prompt(300), 60);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(outcome->status()), "STEP_REFUSED");
}

TEST_F(SchedulerTest, ARestartedStoreServesWhatWasSealed) {
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

TEST_F(SchedulerTest, DecodeGoesOnWhileTheStoreIsAwayAndAfterItsRestart) {
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

TEST_F(SchedulerTest, AStoreThatRestartsUnseenHoldsUpNobodyForLong) {
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

TEST_F(SchedulerTest, AStoreThatLostEverythingCostsARecomputation) {
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

TEST_F(SchedulerTest, AStoreThatStaysAwayEndsOnlyWhoNeedsItsExtents) {
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

TEST_F(SchedulerTest, PeersThatStayAwayEndTheRequests) {
  machine_->step_time = absl::Milliseconds(5);
  SchedulerOptions options;
  options.lost_peer_timeout = absl::Milliseconds(300);
  Start(options);
  auto outcome = Submit(Prompt(300), 5000);
  ASSERT_TRUE(outcome->WaitForTokens(3));
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = true;
  }
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(outcome->status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome->status()), "PEER_LOST");
  {
    MutexLock lock(&machine_->mutex);
    machine_->worker_away = false;
  }
  EXPECT_TRUE(NothingStored()) << "what it had is freed once the worker is back";
}

TEST_F(SchedulerTest, WhatAnEarlierCoordinatorLeftIsFreed) {
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

// ---------------------------------------------------------------- keys in place that do not come

// Of a store that attends, with two steps of a kind in flight whenever there are so many.
class SchedulerInPlaceTest : public SchedulerTest {
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

// ---------------------------------------------------------------- clients

TEST_F(SchedulerTest, ASlowClientPausesOnlyItsOwnRequest) {
  Start();
  auto request = MakeRequest(Prompt(100), 3000);
  auto slow = std::make_shared<Outcome>();
  slow->takes = false;
  ASSERT_TRUE(scheduler_->Submit(*request, slow, [] { return nullptr; }).ok());
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
  ASSERT_TRUE(scheduler_->Submit(*request, outcome, [] { return nullptr; }).ok());
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(ReasonOf(outcome->status()), "SLOW_CLIENT");
  EXPECT_TRUE(NothingStored());
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

// ---------------------------------------------------------------- windows

// The first layer sees 64 tokens, so that its extents have 256 at most; the second sees all.
class WindowTest : public SchedulerTest {
 protected:
  WindowTest() {
    machine_->windows = {64, 0};
    machine_->max_chunk_tokens = 64;
  }
  // The store comes back; `change` is what has become of what it held.
  void RestartStore(const std::function<void()>& change = [] {}) {
    MutexLock lock(&machine_->mutex);
    change();
    ++machine_->generation;
  }
};

TEST_F(WindowTest, AContextIsServedOfWhichTheStoreCouldNotHoldAllTokensOfAllLayers) {
  machine_->host_tokens = 3100;
  Start();
  auto outcome = Submit(Prompt(4000), 200);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(4000), 200));
  const int64_t layer_tokens =
      Under(&FakeMachine::most_used_bytes) / machine_->geometry.BytesPerTokenPerLayer();
  EXPECT_GT(layer_tokens, 4100) << "the second layer keeps all";
  EXPECT_LE(layer_tokens, 4352 + 1664) << "window, lead and parts of extents in the first";
  EXPECT_TRUE(NothingStored());
}

TEST_F(WindowTest, AdmissionStillRefusesWhatCanNeverFit) {
  machine_->host_tokens = 3100;
  Start();
  auto outcome = Submit(Prompt(4000), 600);
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_EQ(ReasonOf(outcome->status()), "DOES_NOT_FIT");
}

TEST_F(WindowTest, ChunksAreNotCutWhereLeasesAreStillToCome) {
  Start();
  ASSERT_TRUE(Submit(Prompt(3000), 2)->WaitForEnd());
  MutexLock lock(&machine_->mutex);
  for (const v1::StepRequest& step : machine_->sent) {
    for (const v1::StepSequence& sequence : step.sequences()) {
      if (sequence.first_pos() >= 2944) continue;
      EXPECT_EQ(sequence.token_ids_size(), 64) << sequence.first_pos();
    }
  }
}

TEST_F(WindowTest, NothingThatIsRunAgainLacksAKey) {
  machine_->break_at_steps = {5, 40, 41, 90};
  machine_->discard_steps = {3, 20, 60, 61, 100, 130};
  machine_->fail_steps = {{30, 13}};
  Start();
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (int i = 0; i < 4; ++i) outcomes.push_back(Submit(Prompt(500 + 300 * i, i), 150));
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(outcomes[i]->WaitForEnd());
    EXPECT_TRUE(outcomes[i]->status().ok()) << outcomes[i]->status();
    EXPECT_EQ(outcomes[i]->tokens(), FakeAnswer(Prompt(500 + 300 * i, i), 150)) << i;
  }
  EXPECT_TRUE(NothingStored());
}

TEST_F(WindowTest, ASessionGoesOnFromItsEndWhateverItHasGivenBack) {
  Start();
  std::vector<int32_t> prompt = Prompt(1000);
  for (int turn = 0; turn < 4; ++turn) {
    auto outcome = SubmitInSession("s", prompt, 50);
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->tokens(), FakeAnswer(prompt, 50));
    if (turn > 0) {
      EXPECT_GE(outcome->finished().usage().cached_tokens() + 80, static_cast<int64_t>(prompt.size()));
    }
    ASSERT_TRUE(IdleSession("s"));
    for (const int32_t token : outcome->tokens()) prompt.push_back(token);
    prompt.push_back(turn);
  }
}

TEST_F(WindowTest, APrefixWhoseWindowIsGoneIsComputedAnew) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1500), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  for (const int64_t length : {1472, 700, 1500}) {
    auto outcome = SubmitInSession("s", Prompt(length), 5);
    ASSERT_TRUE(outcome->WaitForEnd());
    EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(length), 5));
    // 1,472 are sealed, and one block more than the next position sees is kept; what position 640 sees
    // was given back; and of 1,500 the first 640 are the end of what then was computed.
    const int64_t cached = length == 1472 ? 1408 : length == 700 ? 0 : 640;
    EXPECT_EQ(outcome->finished().usage().cached_tokens(), cached) << length;
    ASSERT_TRUE(IdleSession("s"));
  }
  scheduler_->DeleteSession("s", [](const absl::Status&) {});
  EXPECT_TRUE(NothingStored());
}

TEST_F(WindowTest, ARestartedStoreServesWhatIsLeftOfASession) {
  Start();
  ASSERT_TRUE(SubmitInSession("s", Prompt(1000), 5)->WaitForEnd());
  ASSERT_TRUE(IdleSession("s"));
  RestartStore();
  ASSERT_TRUE(Eventually([this] { return scheduler_->facts()->store.generation() == 2; }));
  auto again = SubmitInSession("s", Prompt(1000), 5);
  ASSERT_TRUE(again->WaitForEnd());
  EXPECT_EQ(again->finished().usage().cached_tokens(), 960);
  EXPECT_EQ(again->tokens(), FakeAnswer(Prompt(1000), 5));
}

TEST_F(WindowTest, AStoreThatComesBackWithLessThanTheWindowCostsARecomputation) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  auto outcome = Submit(Prompt(1500), 200);
  ASSERT_TRUE(outcome->WaitForTokens(20));
  RestartStore([this] {
    FakeMachine::Stored& sequence = machine_->stored.begin()->second;
    EXPECT_TRUE(sequence.runs[0].extents(0).vacated());
    sequence.runs.resize(1);  // steps in flight still write to the extents, as to a segment that is mapped
    sequence.sealed_tokens = sequence.runs[0].capacity_tokens();
  });
  ASSERT_TRUE(outcome->WaitForEnd());
  EXPECT_TRUE(outcome->status().ok()) << outcome->status();
  EXPECT_EQ(outcome->tokens(), FakeAnswer(Prompt(1500), 200));
}

}  // namespace
}  // namespace headroom::coordinator
