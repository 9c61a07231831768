// Models whose layers have windows, with host memory for what the windows reach and not for all tokens of
// all layers: what lies behind is given back while the sequence grows, and no answer changes for that.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/kv_layout.h"
#include "headroom/v1/kv_store.grpc.pb.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr int64_t kWindowedPrompt = 2500;
constexpr int32_t kWindowedAnswer = 300;
// 2,799 positions in extents of 256, at 1 KiB in each of 4 layers: 11 MiB. A layer with a window of 200 has
// 1,856 tokens at most: the window and two blocks (384), three chunks of 64 and what is leased ahead (704),
// three extents (768).
constexpr int64_t kAllBytes = 2816 * kTestTokenBytes;
constexpr int64_t kWindowBytes = 1856 * kTestTokenBytes / 4;

struct Family {
  std::string architecture;
  int64_t windowed_layers = 0;
  std::string host_memory;
};
std::ostream& operator<<(std::ostream& out, const Family& family) {
  return out << family.architecture;
}

RandomModelSpec ModelOf(const Family& family) {
  RandomModelSpec spec = SystemTestModel();
  spec.architecture = family.architecture;
  spec.sliding_window = 200;
  if (family.windowed_layers == spec.num_layers) return spec;
  spec.attn_logit_softcapping = 20;
  spec.final_logit_softcapping = 15;
  spec.query_pre_attn_scalar = 64;
  return spec;
}

class Windows : public testing::TestWithParam<Family> {
 protected:
  Windows() { MustWriteModel(ModelOf(GetParam()), model_.File("model")); }

  ClusterOptions Options(const std::string& host_memory) const {
    ClusterOptions options;
    options.model_dir = model_.File("model");
    options.host_memory = host_memory;
    options.worker_args = {"--threads", "1", "--max-chunk-tokens", "64"};
    options.kvstore_args = {"--attend-threads", "1"};
    return options;
  }
  // What a store with room for everything answers, to the prompt and to it, its answer and more.
  void FindExpected() {
    Cluster plenty(Options("64MiB"));
    ASSERT_NO_FATAL_FAILURE(plenty.AwaitServing());
    expected_ = plenty.client().Generate(AskIn("", prompt_, kWindowedAnswer));
    ASSERT_TRUE(expected_.status.ok()) << expected_.status;
    longer_ = prompt_;
    for (const int32_t id : expected_.ids()) longer_.push_back(id);
    for (const int32_t id : RandomPrompt(2, 50)) longer_.push_back(id);
    expected_longer_ = plenty.client().Generate(AskIn("", longer_, 20));
    ASSERT_TRUE(expected_longer_.status.ok()) << expected_longer_.status;
  }
  void Start() {
    cluster_ = std::make_unique<Cluster>(Options(GetParam().host_memory));
    ASSERT_NO_FATAL_FAILURE(cluster_->AwaitServing());
  }
  const TestClient& client() const { return cluster_->client(); }

  // Of the store itself: the coordinator's word is a second old.
  int64_t UsedBytes() const {
    const auto stub = v1::KvStoreService::NewStub(
        grpc::CreateChannel(cluster_->kvstore_address(), grpc::InsecureChannelCredentials()));
    v1::GetStoreInfoResponse info;
    const grpc::Status status =
        stub->GetStoreInfo(TestClient::Context().get(), v1::GetStoreInfoRequest(), &info);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return static_cast<int64_t>(info.used_bytes());
  }
  int64_t MostBytes() const {
    const int64_t windowed = GetParam().windowed_layers;
    return (4 - windowed) * kAllBytes / 4 + windowed * kWindowBytes;
  }
  void ExpectNothingStored() const {
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] { return UsedBytes() == 0; }))
        << UsedBytes();
  }
  // An answer during which `fault` happens, at its 30th token.
  Generation GenerateUnderFault(const v1::GenerateRequest& request,
                                const std::function<void()>& fault) const {
    Generation generation;
    std::atomic<int> generated{0};
    // The stream is on the other thread: processes end with the thread that has started them.
    std::thread streams([&] {
      generation = client().Generate(request, [&](int tokens) { generated.store(tokens); });
    });
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(40)), [&] { return generated.load() >= 30; }));
    EXPECT_LT(generated.load(), kWindowedAnswer) << "it was over before";
    fault();
    streams.join();
    return generation;
  }

  const TestDir model_;
  const std::vector<int32_t> prompt_ = RandomPrompt(1, kWindowedPrompt);
  std::vector<int32_t> longer_;
  Generation expected_;
  Generation expected_longer_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_P(Windows, AContextBeyondHostMemoryIsAnsweredTheSameInEachLane) {
  ASSERT_NO_FATAL_FAILURE(FindExpected());
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::vector<Shares> lanes = {
      AllFetched(), AllResident(), {{v1::LANE_IN_PLACE, 1}},
      {{v1::LANE_RESIDENT, 0.25}, {v1::LANE_FETCHED, 0.5}, {v1::LANE_IN_PLACE, 0.25}}};
  for (size_t i = 0; i < lanes.size(); ++i) {
    int64_t most = 0;
    const Generation generation = client().Generate(
        AskIn("", prompt_, kWindowedAnswer, lanes[i]),
        [&](int tokens) {
          if (tokens % 20 == 1) most = std::max(most, UsedBytes());
        });
    EXPECT_EQ(Difference(generation, expected_), "") << "lanes " << i;
    EXPECT_GT(most, 0);
    EXPECT_LE(most, MostBytes());
    ExpectNothingStored();
  }
}

TEST_P(Windows, ASessionGoesOnFromItsEndAndIsComputedAnewFromBeforeItsWindows) {
  ASSERT_NO_FATAL_FAILURE(FindExpected());
  ASSERT_NO_FATAL_FAILURE(Start());
  EXPECT_EQ(Difference(client().Generate(AskIn("s", prompt_, kWindowedAnswer)), expected_), "");
  const Generation longer = client().Generate(AskIn("s", longer_, 20));
  EXPECT_EQ(Difference(longer, expected_longer_), "");
  EXPECT_EQ(longer.cached_tokens(), FloorToBlock(kWindowedPrompt + kWindowedAnswer - 1));
  const Generation shorter = client().Generate(AskIn("s", prompt_, kWindowedAnswer));
  EXPECT_EQ(Difference(shorter, expected_), "");
  EXPECT_EQ(shorter.cached_tokens(), 0) << "what the prompt's end sees was given back";
  v1::DeleteSessionRequest request;
  request.set_session_id("s");
  v1::DeleteSessionResponse response;
  EXPECT_TRUE(client().api().DeleteSession(TestClient::Context().get(), request, &response).ok());
  ExpectNothingStored();
}

TEST_P(Windows, WhatWasGivenBackIsMissedByNoProcessThatComesBack) {
  ASSERT_NO_FATAL_FAILURE(FindExpected());
  ASSERT_NO_FATAL_FAILURE(Start());
  const Generation without_store = GenerateUnderFault(AskIn("s", prompt_, kWindowedAnswer), [this] {
    cluster_->kvstore().Kill();
    absl::SleepFor(absl::Milliseconds(100));
    cluster_->StartKvStore();
  });
  EXPECT_EQ(Difference(without_store, expected_), "");
  ASSERT_NO_FATAL_FAILURE(cluster_->AwaitServing());
  EXPECT_LE(UsedBytes(), MostBytes());
  const Generation longer = client().Generate(AskIn("s", longer_, 20));
  EXPECT_EQ(Difference(longer, expected_longer_), "");
  EXPECT_GT(longer.cached_tokens(), kWindowedPrompt);
  const Generation without_worker = GenerateUnderFault(AskIn("s", prompt_, kWindowedAnswer), [this] {
    cluster_->worker().Kill();
    cluster_->StartWorker();
  });
  EXPECT_EQ(Difference(without_worker, expected_), "");
}

INSTANTIATE_TEST_SUITE_P(Families, Windows,
                         testing::Values(Family{"MistralForCausalLM", 4, "7424KiB"},
                                         Family{"Gemma2ForCausalLM", 2, "9344KiB"}),
                         [](const auto& info) { return info.param.architecture; });

}  // namespace
}  // namespace headroom
