// The same bits through three processes, whatever the placement, the chunks, the company, the threads.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

// Beyond the 256 tokens that a tail may keep, and no multiple of a block.
constexpr int64_t kPromptTokens = 421;
constexpr int32_t kAnswerTokens = 70;  // the answer seals blocks too

v1::GenerateRequest AskPlaced(const std::vector<int32_t>& prompt, const Shares& shares,
                              int32_t chunk_tokens = 0) {
  v1::GenerateRequest request = Ask(prompt, kAnswerTokens);
  Place(request, shares);
  if (chunk_tokens != 0) request.mutable_placement()->set_chunk_tokens(chunk_tokens);
  return request;
}

v1::GenerateRequest Sampled(v1::GenerateRequest request, uint64_t seed) {
  request.mutable_sampling()->set_temperature(0.8f);
  request.mutable_sampling()->set_top_k(100);
  request.mutable_sampling()->set_top_p(0.9f);
  request.mutable_sampling()->set_seed(seed);
  return request;
}

// One cluster for all tests of the suite: they only ask.
class Exactness : public testing::Test {
 protected:
  static void SetUpTestSuite() { cluster_ = std::make_unique<Cluster>(); }
  static void TearDownTestSuite() { cluster_.reset(); }
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(cluster_->AwaitServing()); }

  static const TestClient& client() { return cluster_->client(); }

 private:
  static std::unique_ptr<Cluster> cluster_;
};
std::unique_ptr<Cluster> Exactness::cluster_;

TEST_F(Exactness, HoldsForEveryPlacementAndChunkSize) {
  const std::vector<int32_t> prompt = RandomPrompt(1, kPromptTokens);
  const Generation expected = client().Generate(AskPlaced(prompt, AllResident()));
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  ASSERT_EQ(expected.tokens.size(), static_cast<size_t>(kAnswerTokens));
  ASSERT_EQ(expected.finished.prompt_logprobs_size(), kPromptTokens - 1);
  for (const double resident : {1.0, 0.0, 0.25, 0.5, 0.75}) {
    for (const int32_t chunk : {1, 7, 64, 0}) {
      if (kSanitized && chunk < 64 && resident != 0.5) continue;  // minutes there
      SCOPED_TRACE(absl::StrCat("resident ", resident, ", chunks of ", chunk));
      const Generation generation =
          client().Generate(AskPlaced(prompt, ResidentShare(resident), chunk));
      EXPECT_EQ(Difference(generation, expected), "");
      // True, and not because both ran the same way.
      EXPECT_EQ(generation.LaneBytes(v1::LANE_FETCHED) > 0, resident < 1);
      EXPECT_EQ(generation.KvHeads(v1::LANE_RESIDENT), 4 * resident);
    }
  }
}

TEST_F(Exactness, HoldsForAHeadThatIsSplitBetweenLanes) {
  const std::vector<int32_t> prompt = RandomPrompt(2, 1100);
  const Generation expected = client().Generate(AskPlaced(prompt, AllResident()));
  const Generation split = client().Generate(AskPlaced(prompt, ResidentShare(0.4)));
  EXPECT_EQ(Difference(split, expected), "");
}

TEST_F(Exactness, HoldsAmongFiveRaggedRequests) {
  const std::vector<int64_t> lengths = {1, 65, 200, kPromptTokens, 700};
  std::vector<Generation> alone;
  const auto request_of = [&](size_t i, const Shares& shares) {
    v1::GenerateRequest request = AskPlaced(RandomPrompt(10 + i, lengths[i]), shares, 64);
    request.mutable_stopping()->set_max_tokens(static_cast<int32_t>(20 + 10 * i));
    return i % 2 == 0 ? request : Sampled(request, 1000 + i);
  };
  for (size_t i = 0; i < lengths.size(); ++i) {
    alone.push_back(client().Generate(request_of(i, AllResident())));
    ASSERT_TRUE(alone.back().status.ok()) << alone.back().status;
  }
  for (const double resident : {1.0, 0.0, 0.5}) {
    std::vector<v1::GenerateRequest> requests;
    for (size_t i = 0; i < lengths.size(); ++i) {
      requests.push_back(request_of(i, ResidentShare(resident)));
    }
    const std::vector<Generation> together = client().GenerateAll(requests);
    for (size_t i = 0; i < lengths.size(); ++i) {
      EXPECT_EQ(Difference(together[i], alone[i]), "")
          << "resident " << resident << ", a prompt of " << lengths[i] << " tokens";
    }
  }
}

TEST_F(Exactness, HoldsForSeededSamplingAndSeedsDiffer) {
  const std::vector<int32_t> prompt = RandomPrompt(3, kPromptTokens);
  const Generation expected = client().Generate(Sampled(AskPlaced(prompt, AllResident()), 7));
  EXPECT_EQ(Difference(client().Generate(Sampled(AskPlaced(prompt, AllFetched(), 64), 7)), expected),
            "");
  EXPECT_NE(client().Generate(Sampled(AskPlaced(prompt, AllResident()), 8)).ids(), expected.ids());
}

TEST_F(Exactness, HoldsForTwoThreadsAndForADeviceThatDelays) {
  const std::vector<int32_t> prompt = RandomPrompt(4, kPromptTokens);
  const Generation expected = client().Generate(AskPlaced(prompt, AllResident()));
  ASSERT_TRUE(expected.status.ok()) << expected.status;

  ClusterOptions two_threads;
  two_threads.worker_args = {"--threads", "2"};
  Cluster other(two_threads);
  ASSERT_NO_FATAL_FAILURE(other.AwaitServing());
  for (const int32_t chunk : {7, 0}) {
    EXPECT_EQ(Difference(other.client().Generate(AskPlaced(prompt, AllFetched(), chunk)), expected),
              "");
    EXPECT_EQ(Difference(other.client().Generate(AskPlaced(prompt, AllResident(), chunk)), expected),
              "");
  }

  // Each operation waits 0 to 5 ms: a missing event shows.
  ClusterOptions delays;
  delays.worker_args = {"--threads", "1", "--delay-seed", "11"};
  Cluster slow(delays);
  ASSERT_NO_FATAL_FAILURE(slow.AwaitServing());
  v1::GenerateRequest request = AskPlaced(prompt, ResidentShare(0.5), 256);
  request.mutable_stopping()->set_max_tokens(4);
  Generation shorter = expected;
  shorter.tokens.resize(4);
  EXPECT_EQ(Difference(slow.client().Generate(request), shorter), "");
}

}  // namespace
}  // namespace headroom
