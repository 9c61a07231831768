// Processes die, hang and come back: what is sealed stays, nothing waits for ever, and the next answer
// is right.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr int32_t kLongAnswer = 600;

v1::GenerateRequest AskHalf(const std::string& session, const std::vector<int32_t>& prompt,
                            int32_t max_tokens) {
  return AskIn(session, prompt, max_tokens, ResidentShare(0.5));
}

class Restart : public testing::Test {
 protected:
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing()); }
  void TearDown() override {
    EXPECT_TRUE(client().AwaitIdle(absl::Seconds(20))) << client().Load().ShortDebugString();
  }
  const TestClient& client() const { return cluster_.client(); }

  // A stream during which `fault` happens, at its 30th token. It ends as if nothing had been, or with
  // UNAVAILABLE after a right beginning.
  Generation GenerateUnderFault(const std::string& session, const std::vector<int32_t>& prompt,
                                const Generation& expected,
                                const std::function<void()>& fault) const {
    Generation generation;
    std::atomic<int> generated{0};
    // The stream is on the other thread: processes end with the thread that has started them.
    std::thread streams([&] {
      generation = client().Generate(AskHalf(session, prompt, kLongAnswer),
                                     [&](int tokens) { generated.store(tokens); });
    });
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return generated.load() >= 30; }));
    EXPECT_LT(generated.load(), kLongAnswer) << "it was over before";
    fault();
    streams.join();
    if (generation.status.ok()) {
      EXPECT_EQ(Difference(generation, expected), "");
    } else {
      EXPECT_TRUE(absl::IsUnavailable(generation.status)) << generation.status;
      Generation beginning = expected;
      beginning.tokens.resize(generation.tokens.size());
      EXPECT_EQ(generation.ids(), beginning.ids());
    }
    return generation;
  }

  Cluster cluster_;
};

TEST_F(Restart, AKilledStoreComesBackWithItsSealedExtents) {
  const std::vector<int32_t> first = RandomPrompt(1, 500);
  std::vector<int32_t> second = first;
  for (const int32_t id : RandomPrompt(2, 100)) second.push_back(id);
  const Generation expected = client().Generate(AskHalf("", second, 30));
  ASSERT_TRUE(client().Generate(AskHalf("s", first, 5)).status.ok());
  EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));

  cluster_.kvstore().Kill();
  EXPECT_TRUE(client().AwaitHealth("NOT_SERVING", absl::Seconds(10)));
  cluster_.StartKvStore();
  EXPECT_TRUE(client().AwaitHealth("SERVING", absl::Seconds(20)));

  const Generation continued = client().Generate(AskHalf("s", second, 30));
  EXPECT_EQ(Difference(continued, expected), "");
  EXPECT_GE(continued.cached_tokens(), 448);
}

TEST_F(Restart, AStreamOutlivesTheDeathOfTheStore) {
  const std::vector<int32_t> prompt = RandomPrompt(3, 400);
  const Generation expected = client().Generate(AskHalf("", prompt, kLongAnswer));
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  const Generation generation = GenerateUnderFault("s", prompt, expected, [this] {
    cluster_.kvstore().Kill();
    absl::SleepFor(absl::Milliseconds(300));
    cluster_.StartKvStore();
  });
  EXPECT_TRUE(generation.status.ok()) << "the worker has the extents mapped";
  EXPECT_TRUE(client().AwaitHealth("SERVING", absl::Seconds(20)));
  const Generation again = client().Generate(AskHalf("s", prompt, kLongAnswer));
  EXPECT_EQ(Difference(again, expected), "");
  EXPECT_GE(again.cached_tokens(), 256);
}

TEST_F(Restart, AKilledWorkerCostsAPause) {
  const std::vector<int32_t> prompt = RandomPrompt(4, 400);
  const Generation expected = client().Generate(AskHalf("", prompt, kLongAnswer));
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  GenerateUnderFault("s", prompt, expected, [this] {
    cluster_.worker().Kill();
    cluster_.StartWorker();
  });
  ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing());
  const Generation again = client().Generate(AskHalf("s", prompt, kLongAnswer));
  EXPECT_EQ(Difference(again, expected), "");
  EXPECT_GE(again.cached_tokens(), 256);
}

// As with an Xid: no later operation of the process runs, so that the process must go.
TEST(DeviceLost, EndsTheWorkerWithACodeOfItsOwnAndCostsNoToken) {
  const TestDir dir;
  ClusterOptions options;
  options.worker_args = {"--threads", "1", "--fail-file", dir.File("lost")};
  Cluster cluster(options);
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  const v1::GenerateRequest request = AskHalf("", RandomPrompt(7, 400), kLongAnswer);
  const Generation expected = cluster.client().Generate(request);
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  std::atomic<int> generated{0};
  Generation generation;
  std::thread streams([&] {
    generation = cluster.client().Generate(request, [&](int tokens) { generated.store(tokens); });
  });
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return generated.load() >= 30; }));
  std::ofstream(dir.File("lost")) << "now";
  EXPECT_EQ(cluster.worker().Wait(Patience(absl::Seconds(5))), 3);
  EXPECT_TRUE(absl::StrContains(cluster.worker().Log(), "the device is lost"));
  std::filesystem::remove(dir.File("lost"));
  cluster.StartWorker();
  streams.join();
  EXPECT_EQ(Difference(generation, expected), "");
}

// The new worker is told what the old one had counted.
TEST_F(Restart, PenaltiesOutliveTheWorker) {
  v1::GenerateRequest request = AskIn("", RandomPrompt(5, 300), 300);
  request.mutable_sampling()->set_temperature(0.7f);
  request.mutable_sampling()->set_seed(3);
  request.mutable_sampling()->set_frequency_penalty(0.4f);
  request.mutable_sampling()->set_presence_penalty(0.3f);
  request.mutable_sampling()->set_repetition_penalty(1.1f);
  const Generation expected = client().Generate(request);
  ASSERT_EQ(expected.tokens.size(), 300u) << expected.status;
  EXPECT_EQ(Difference(client().Generate(request), expected), "") << "the seed fixes the text";
  std::atomic<int> generated{0};
  Generation generation;
  std::thread streams([&] {
    generation = client().Generate(request, [&](int tokens) { generated.store(tokens); });
  });
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return generated.load() >= 30; }));
  cluster_.worker().Kill();
  cluster_.StartWorker();
  streams.join();
  ASSERT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.ids(), expected.ids());
  ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing());
}

TEST_F(Restart, AWorkerThatIsAwayMakesHealthSaySo) {
  cluster_.worker().Kill();
  EXPECT_TRUE(client().AwaitHealth("NOT_SERVING", absl::Seconds(10)));
  // A request waits for it.
  const std::vector<int32_t> prompt = RandomPrompt(5, 100);
  Generation generation;
  std::thread waits([&] { generation = client().Generate(AskHalf("", prompt, 10)); });
  absl::SleepFor(absl::Milliseconds(500));
  EXPECT_EQ(client().Load().waiting_requests(), 1);
  cluster_.StartWorker();
  waits.join();
  EXPECT_EQ(generation.tokens.size(), 10u) << generation.status;
  EXPECT_TRUE(client().AwaitHealth("SERVING", absl::Seconds(20)));
}

TEST_F(Restart, AProcessThatHangsForAWhileCostsAPause) {
  const std::vector<int32_t> prompt = RandomPrompt(6, 400);
  const Generation expected = client().Generate(AskHalf("", prompt, kLongAnswer));
  for (Process* const process : {&cluster_.worker(), &cluster_.kvstore()}) {
    const Generation generation = GenerateUnderFault("", prompt, expected, [&] {
      process->Signal(SIGSTOP);
      absl::SleepFor(absl::Milliseconds(1500));
      process->Signal(SIGCONT);
    });
    EXPECT_TRUE(generation.status.ok()) << generation.status;
  }
}

TEST_F(Restart, AKilledCoordinatorLeavesNothingBehind) {
  const std::vector<int32_t> prompt = RandomPrompt(7, 400);
  const Generation expected = client().Generate(AskHalf("", prompt, kLongAnswer));
  const Generation broken =
      GenerateUnderFault("", prompt, expected, [this] { cluster_.coordinator().Kill(); });
  EXPECT_TRUE(absl::IsUnavailable(broken.status)) << broken.status;
  cluster_.StartCoordinator();
  ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing());
  EXPECT_EQ(Difference(client().Generate(AskHalf("", prompt, kLongAnswer)), expected), "");
  // What the earlier one had allocated is freed.
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)),
                        [&] { return client().Load().host_used_bytes() == 0; }))
      << client().Load().host_used_bytes();
}

// Its keys would be another model's: nothing is served and nothing given up before somebody says so.
TEST_F(Restart, ASegmentOfAnotherModelIsRefusedWithTheFlagToSet) {
  ASSERT_TRUE(client().Generate(AskHalf("kept", RandomPrompt(1, 200), 4)).status.ok());
  cluster_.coordinator().Kill();
  cluster_.worker().Kill();
  RandomModelSpec other = SystemTestModel();
  other.seed = 2;
  MustWriteModel(other, cluster_.model_dir());
  cluster_.StartWorker();
  cluster_.StartCoordinator();
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(2)), [&] {
    const std::string log = cluster_.coordinator().Log();
    return absl::StrContains(log, "--allow-clean-segment") && absl::StrContains(log, "--segment-dir");
  })) << cluster_.coordinator().Log();
  EXPECT_TRUE(client().AwaitHealth("NOT_SERVING", absl::Seconds(2)));
  EXPECT_TRUE(cluster_.kvstore().running());
  cluster_.AddCoordinatorArg("--allow-clean-segment");
  cluster_.StartCoordinator();
  ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing());
  EXPECT_EQ(client().Generate(AskHalf("", RandomPrompt(1, 200), 4)).tokens.size(), 4u);
}

}  // namespace
}  // namespace headroom
