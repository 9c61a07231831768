// Models whose layers see a window.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <vector>

#include "common/errors.h"
#include "tests/unit/services/coordinator/scheduler_fixture.h"

namespace headroom::coordinator {
namespace {

// The first layer sees 64 tokens, so that its extents have 256 at most; the second sees all.
class WindowTest : public SchedulerFixture {
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
