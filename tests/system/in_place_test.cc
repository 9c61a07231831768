// The lane in place through three processes: the same bits as elsewhere; and processes that die or hang
// at any moment of it cost a pause, never a token. HEADROOM_TEST_ROUNDS sets how many moments are tried.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr absl::Duration kInPlaceDeadline = absl::Milliseconds(300);

Shares AllInPlace() { return {{v1::LANE_IN_PLACE, 1}}; }

int Rounds() {
  const char* const rounds = std::getenv("HEADROOM_TEST_ROUNDS");
  return rounds != nullptr ? std::atoi(rounds) : kSanitized ? 2 : 4;
}

// On a GPU keys in place have bits of their own, and a step that is run again has them fetched. There two
// answers hold the same ids, with log-probabilities within 0.1, up to a choice that was as close; what
// follows it hangs on it.
std::string Unlike(const Generation& a, const Generation& b) {
  constexpr double kRounding = 0.1;
  const char* const device = std::getenv("HEADROOM_TEST_DEVICE");
  if (device == nullptr || std::string(device) == "cpu" || !a.status.ok() || !b.status.ok()) {
    return Difference(a, b);
  }
  if (a.tokens.size() != b.tokens.size()) return "numbers of tokens";
  for (size_t i = 0; i < a.tokens.size(); ++i) {
    const double apart = std::abs(a.tokens[i].logprob() - b.tokens[i].logprob());
    if (!(apart <= kRounding)) return absl::StrCat("token ", i, ": log-probabilities ", apart, " apart");
    if (a.tokens[i].token_id() != b.tokens[i].token_id()) return "";
  }
  return "";
}

v1::GenerateRequest AskPlaced(const std::vector<int32_t>& prompt, int32_t max_tokens,
                              const Shares& shares) {
  v1::GenerateRequest request = Ask(prompt, max_tokens);
  Place(request, shares);
  return request;
}

class InPlace : public testing::Test {
 protected:
  static ClusterOptions Options() {
    ClusterOptions options;
    options.kvstore_args = {"--attend-threads", "2"};
    options.worker_args = {"--threads", "1", "--in-place-deadline",
                           absl::FormatDuration(kInPlaceDeadline)};
    return options;
  }
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing()); }

  const TestClient& client() const { return cluster_.client(); }

  // What a stream came to, and the longest time without a token after the first.
  struct Streamed {
    Generation generation;
    absl::Duration longest_gap;
  };
  // The longest pause so far. Many rounds take minutes: each tells, so that a run that is cut off has told what it saw.
  static absl::Duration Longest(absl::Duration before, const Streamed& streamed, int round) {
    const absl::Duration longest = std::max(before, streamed.longest_gap);
    if (std::getenv("HEADROOM_TEST_ROUNDS") != nullptr) {
      std::printf("round %d of %d: paused %s, longest %s\n", round + 1, Rounds(),
                  absl::FormatDuration(streamed.longest_gap).c_str(), absl::FormatDuration(longest).c_str());
      std::fflush(stdout);
    }
    return longest;
  }
  // `fault` happens some random moments after the `at`-th token.
  Streamed StreamUnderFault(const v1::GenerateRequest& request, int at,
                            const std::function<void()>& fault) {
    Streamed streamed;
    std::atomic<int> generated{0};
    std::thread streams([&] {
      absl::Time last = absl::InfiniteFuture();
      streamed.generation = client().Generate(request, [&](int tokens) {
        const absl::Time now = absl::Now();
        streamed.longest_gap = std::max(streamed.longest_gap, now - last);
        last = now;
        generated.store(tokens);
      });
    });
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return generated.load() >= at; }));
    absl::SleepFor(absl::Microseconds(std::uniform_int_distribution<int>(0, 20'000)(random_)));
    fault();
    streams.join();
    return streamed;
  }
  // Until the store attends to keys in place again.
  void AwaitInPlace() {
    const v1::GenerateRequest request = AskPlaced(RandomPrompt(99, 200), 4, AllInPlace());
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(30)), [&] {
      return client().Generate(request).LaneBytes(v1::LANE_IN_PLACE) > 0;
    }));
  }
  void ExpectNoExtentsLeft() {
    EXPECT_TRUE(client().AwaitIdle(Patience(absl::Seconds(10))));
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)),
                          [&] { return client().Load().host_used_bytes() == 0; }))
        << client().Load().host_used_bytes() << " bytes of extents are left";
  }
  int RandomToken(int most) { return std::uniform_int_distribution<int>(1, most)(random_); }

  Cluster cluster_{Options()};
  std::mt19937 random_{20261124};
};

TEST_F(InPlace, HoldsTheSameBitsForWholeHeads) {
  const std::vector<int32_t> prompt = RandomPrompt(1, 421);
  const Generation expected = client().Generate(AskPlaced(prompt, 70, AllResident()));
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  for (const Shares& shares : std::vector<Shares>{
           AllInPlace(),
           {{v1::LANE_FETCHED, 0.5}, {v1::LANE_IN_PLACE, 0.5}},
           {{v1::LANE_RESIDENT, 0.5}, {v1::LANE_FETCHED, 0.25}, {v1::LANE_IN_PLACE, 0.25}}}) {
    for (const int32_t chunk : {7, 64, 0}) {
      if (kSanitized && chunk != 64) continue;
      v1::GenerateRequest request = AskPlaced(prompt, 70, shares);
      if (chunk != 0) request.mutable_placement()->set_chunk_tokens(chunk);
      const Generation generation = client().Generate(request);
      EXPECT_EQ(Unlike(generation, expected), "") << chunk;
      EXPECT_GT(generation.LaneBytes(v1::LANE_IN_PLACE), 0);
      EXPECT_EQ(generation.finished.explanation().retried_steps(), 0);
    }
  }
  const v1::InPlaceCounters counters = client().Status().in_place();
  EXPECT_EQ(counters.refused(), 0u);
  EXPECT_EQ(counters.late_partials(), 0u);
}

TEST_F(InPlace, AKilledStoreCostsAPause) {
  const std::vector<int32_t> prompt = RandomPrompt(2, 400);
  const v1::GenerateRequest request = AskPlaced(prompt, 200, AllInPlace());
  const Generation expected = client().Generate(request);
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  absl::Duration longest;
  int retried = 0;
  for (int round = 0; round < Rounds(); ++round) {
    AwaitInPlace();
    const Streamed streamed = StreamUnderFault(request, RandomToken(150), [this] {
      cluster_.kvstore().Kill();
      cluster_.StartKvStore();
    });
    ASSERT_TRUE(streamed.generation.status.ok()) << streamed.generation.status << ", " << round;
    ASSERT_EQ(Unlike(streamed.generation, expected), "") << round;
    longest = Longest(longest, streamed, round);
    retried += streamed.generation.finished.explanation().retried_steps() > 0 ? 1 : 0;
  }
  std::printf("%d rounds, %d with steps run again, longest pause %s\n", Rounds(), retried,
              absl::FormatDuration(longest).c_str());
  EXPECT_LT(longest, kInPlaceDeadline + Patience(absl::Seconds(5)));
  ExpectNoExtentsLeft();
}

TEST_F(InPlace, AStoppedStoreCostsAPauseAndItsAnswersAreNotTaken) {
  const std::vector<int32_t> prompt = RandomPrompt(3, 400);
  // So many that a fault after the 150th finds steps to stop, on a GPU, too.
  const v1::GenerateRequest request = AskPlaced(prompt, kSanitized ? 200 : 400, AllInPlace());
  const Generation expected = client().Generate(request);
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  const absl::Duration stopped =
      std::getenv("HEADROOM_TEST_ROUNDS") != nullptr ? absl::Seconds(10) : absl::Seconds(1);
  absl::Duration longest;
  for (int round = 0; round < Rounds(); ++round) {
    AwaitInPlace();
    const Streamed streamed = StreamUnderFault(request, RandomToken(150), [&] {
      cluster_.kvstore().Signal(SIGSTOP);
      absl::SleepFor(stopped);
      cluster_.kvstore().Signal(SIGCONT);
    });
    ASSERT_TRUE(streamed.generation.status.ok()) << streamed.generation.status << ", " << round;
    ASSERT_EQ(Unlike(streamed.generation, expected), "") << round;
    EXPECT_GT(streamed.generation.finished.explanation().retried_steps(), 0);
    longest = Longest(longest, streamed, round);
  }
  AwaitInPlace();
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] {
    return client().Status().in_place().late_partials() > 0;
  }));
  std::printf("%d rounds, %ld late partials, longest pause %s\n", Rounds(),
              static_cast<long>(client().Status().in_place().late_partials()),
              absl::FormatDuration(longest).c_str());
  EXPECT_LT(longest, kInPlaceDeadline + Patience(absl::Seconds(2)));
  ExpectNoExtentsLeft();
}

TEST_F(InPlace, AKilledWorkerLosesNoToken) {
  const std::vector<int32_t> prompt = RandomPrompt(4, kSanitized ? 500 : 3000);
  v1::GenerateRequest request = AskPlaced(prompt, 100, AllInPlace());
  request.mutable_logprobs()->set_prompt(false);
  const Generation expected = client().Generate(request);
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  absl::Duration longest;
  for (int round = 0; round < Rounds(); ++round) {
    const bool in_prefill = round % 2 == 0;
    const Streamed streamed = StreamUnderFault(request, in_prefill ? 0 : RandomToken(80), [this] {
      cluster_.worker().Kill();
      cluster_.StartWorker();
    });
    ASSERT_TRUE(streamed.generation.status.ok()) << streamed.generation.status << ", " << round;
    ASSERT_EQ(Unlike(streamed.generation, expected), "") << round;
    longest = Longest(longest, streamed, round);
  }
  std::printf("%d rounds, longest pause %s\n", Rounds(), absl::FormatDuration(longest).c_str());
  EXPECT_LT(longest, Patience(absl::Seconds(10)));
  ExpectNoExtentsLeft();
}

TEST(InPlaceOff, AStoreWithoutThreadsRefusesSuchPlansAndServesTheOthers) {
  ClusterOptions options;
  options.kvstore_args = {"--attend-threads", "0"};
  Cluster cluster(options);
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  const TestClient& client = cluster.client();
  const std::vector<int32_t> prompt = RandomPrompt(5, 400);
  const Generation refused = client.Generate(AskPlaced(prompt, 10, AllInPlace()));
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status)) << refused.status;
  EXPECT_EQ(ReasonOf(refused.status), "IN_PLACE_NOT_SERVED");
  EXPECT_TRUE(client.Generate(AskPlaced(prompt, 10, AllFetched())).status.ok());
  v1::GenerateRequest automatic = Ask(prompt, 10);
  automatic.set_explain(true);
  const Generation generation = client.Generate(automatic);
  EXPECT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.LaneBytes(v1::LANE_IN_PLACE), 0);
}

}  // namespace
}  // namespace headroom
