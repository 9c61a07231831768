// What the scheduler's tests share.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_SCHEDULER_FIXTURE_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_SCHEDULER_FIXTURE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "services/coordinator/scheduler.h"
#include "tests/common/eventually.h"
#include "tests/unit/services/coordinator/fake_store.h"
#include "tests/unit/services/coordinator/fake_worker.h"

namespace headroom::coordinator {

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

inline std::vector<int32_t> Prompt(int64_t tokens, int32_t seed = 1) {
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < tokens; ++i) {
    prompt.push_back(static_cast<int32_t>((i * 7919 + seed * 104729) % kFakeVocab));
  }
  return prompt;
}

// A scheduler between a worker and a store that are fakes; what they note as wrong fails the test.
class SchedulerFixture : public testing::Test {
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
  absl::Status SubmitTo(std::shared_ptr<RequestSink> sink, const Request& request,
                        const std::function<std::unique_ptr<TokenDecoder>()>& make_decoder = [] {
                          return nullptr;
                        }) {
    absl::Status status = scheduler_->Reserve(request.id, request.n);
    if (!status.ok()) return status;
    status = scheduler_->Submit(request, std::move(sink), make_decoder);
    if (!status.ok()) scheduler_->GiveUp(request.id);
    return status;
  }
  std::shared_ptr<Outcome> Submit(std::unique_ptr<Request> request,
                                  std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>()) {
    const absl::Status status =
        SubmitTo(outcome, *request, [] { return std::make_unique<NumberDecoder>(); });
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

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_SCHEDULER_FIXTURE_H_
