// Sequences that nobody wants any more while steps of theirs are under way.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "tests/common/forwarding_device.h"
#include "tests/unit/services/worker/steps_test_util.h"

namespace headroom {
namespace {

// Tells of attention as it is enqueued, by the executor's thread.
class TellingDevice : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  absl::Status Attend(StreamId stream, const kernels::AttendArgs& args, OpAccount* account) override {
    ++attends;
    if (on_attend) std::exchange(on_attend, nullptr)();
    return ForwardingDevice::Attend(stream, args, account);
  }

  std::atomic<int> attends{0};
  std::function<void()> on_attend;  // called once, at the next
};

class AbandonedSteps : public Steps {
 protected:
  void Configure(WorkerHarnessOptions& options) override {
    options.wrap_device = [this](std::unique_ptr<Device> device) {
      auto telling = std::make_unique<TellingDevice>(std::move(device));
      device_ = telling.get();
      return telling;
    };
  }
  void Abandon(uint64_t id) { harness_->executor().Abandon({id}); }
  void Submit(std::unique_ptr<Step> step) { ASSERT_TRUE(harness_->Submit(std::move(step)).ok()); }
  void ExpectAbandoned(const std::unique_ptr<Step>& step) {
    ASSERT_NE(step, nullptr);
    EXPECT_EQ(step->result.status.code(), absl::StatusCode::kCancelled) << step->result.status;
    EXPECT_TRUE(step->result.retry);
    EXPECT_TRUE(step->result.tokens.empty());
  }
  void Close(uint64_t id) {
    auto step = std::make_unique<Step>();
    step->plan_version = kFetched;
    step->close.push_back(id);
    EXPECT_TRUE(harness_->RunStep(std::move(step))->result.status.ok());
  }

  TellingDevice* device_ = nullptr;
};

TEST_F(AbandonedSteps, AChunkStopsAtTheNextLayer) {
  const auto expected = Tokens(Opening(1, 640, 300));
  const int attends = device_->attends.exchange(0);
  EXPECT_EQ(attends % harness_->config().num_layers, 0);
  Close(1);
  device_->on_attend = [this] { Abandon(1); };
  ExpectAbandoned(harness_->RunStep(Opening(1, 640, 300)));
  EXPECT_EQ(device_->attends.exchange(0), attends / harness_->config().num_layers);
  // Nor is one that begins later, until the sequence is closed.
  ExpectAbandoned(harness_->RunStep(StepOf(Piece(1, 0, 300))));
  EXPECT_EQ(device_->attends.load(), 0);
  Close(1);
  EXPECT_EQ(Difference(Tokens(Opening(1, 640, 300)), expected), "");
}

TEST_F(AbandonedSteps, AChunkOfOthersTooIsRunToItsEnd) {
  auto step = Opening(1, 640, 300);
  auto other = Opening(2, 640, 200);
  step->open.push_back(other->open[0]);
  step->sequences.push_back(other->sequences[0]);
  device_->on_attend = [this] { Abandon(1); };
  EXPECT_EQ(Tokens(std::move(step)).size(), 2u);
  EXPECT_EQ(Tokens(StepOf(Piece(2, 200, 1))).size(), 1u);
}

// Their tokens were sent ahead, in steps with one of the abandoned sequence and behind those.
TEST_F(AbandonedSteps, TheTokensOfOthersAreRunAgain) {
  Tokens(Opening(3, 640, 100));
  auto opening = Opening(2, 640, 100);
  opening->sequences[0].token_ids = Piece(3, 0, 100).token_ids;
  Tokens(std::move(opening));
  const auto piece = [this](int64_t pos) {  // the same tokens for both
    StepSequence one = Piece(3, pos, 1);
    one.sequence_id = 2;
    return one;
  };
  std::vector<std::vector<kernels::SampleResult>> expected;
  for (const int64_t pos : {100, 101, 102}) expected.push_back(Tokens(StepOf(Piece(3, pos, 1))));

  device_->on_attend = [this] { Abandon(1); };
  Submit(Opening(1, 640, 300));
  auto both = StepOf(piece(100));
  both->sequences.push_back(Piece(1, 300, 1));
  Submit(std::move(both));
  Submit(StepOf(piece(101)));
  for (int i = 0; i < 3; ++i) ExpectAbandoned(harness_->Await());
  // Again, and one more ahead of its answer.
  Submit(StepOf(piece(100)));
  Submit(StepOf(piece(101)));
  for (int i = 0; i < 2; ++i) {
    const std::unique_ptr<Step> step = harness_->Await();
    ASSERT_NE(step, nullptr);
    EXPECT_TRUE(step->result.status.ok()) << step->result.status;
    EXPECT_EQ(Difference(step->result.tokens, expected[i]), "");
  }
  Close(1);
  EXPECT_EQ(Difference(Tokens(StepOf(piece(102))), expected[2]), "");
}

}  // namespace
}  // namespace headroom
