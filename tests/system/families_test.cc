// Each family of models through three processes: its goldens, the same bits in every lane, its chats.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/golden/golden.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr int32_t kFamilyAnswer = 70;  // seals blocks too
constexpr int32_t kTop = 20;

// What softmax makes of a golden row, as natural logarithms.
std::vector<double> LogSoftmax(std::span<const float> logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
  std::vector<double> logs;
  for (const float logit : logits) logs.push_back(logit - max - std::log(sum));
  return logs;
}

class Family : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const char* const root = std::getenv("HEADROOM_SOURCE_DIR");
    absl::StatusOr<Golden> golden =
        ReadGolden(absl::StrCat(root == nullptr ? "." : root, "/tests/golden/data"), GetParam());
    ASSERT_TRUE(golden.ok()) << golden.status();
    golden_ = *std::move(golden);
    golden_.spec.with_tokenizer = true;
    ClusterOptions options;
    options.worker_args.insert(options.worker_args.end(), {"--in-place-deadline", "10s"});
    options.model_dir = dir_.File("model");
    options.gpu_memory = "96MiB";  // all of 1,070 tokens may be resident beside a ring of 32 MiB
    MustWriteModel(golden_.spec, options.model_dir);
    cluster_ = std::make_unique<Cluster>(options);
    ASSERT_NO_FATAL_FAILURE(cluster_->AwaitServing());
  }
  const TestClient& client() const { return cluster_->client(); }

  // Log-probabilities of a prompt and of its answer's first token against the golden's logits.
  void CompareWithGolden(const GoldenCase& golden_case, const Generation& generation) const {
    double sum = 0, max = 0;
    int64_t compared = 0;
    const auto compare = [&](double got, double expected) {
      const double error = std::abs(got - expected) / golden_case.logits_std;
      sum += error;
      max = std::max(max, error);
      ++compared;
    };
    for (size_t i = 0; i < golden_case.positions.size(); ++i) {
      const int32_t position = golden_case.positions[i];
      const std::vector<double> logs = LogSoftmax(golden_.Logits(golden_case, i));
      if (position + 1 < static_cast<int32_t>(golden_case.token_ids.size())) {
        const v1::TokenRecord& record = generation.finished.prompt_logprobs(position);
        ASSERT_EQ(record.token_id(), golden_case.token_ids[position + 1]);
        compare(record.logprob(), logs[record.token_id()]);
        for (const auto& top : record.top()) compare(top.logprob(), logs[top.token_id()]);
      } else {
        ASSERT_EQ(generation.tokens[0].top_size(), kTop);
        for (const auto& top : generation.tokens[0].top()) compare(top.logprob(), logs[top.token_id()]);
      }
    }
    // A log-probability has two errors: its logit's and that of the sum over all.
    EXPECT_GT(compared, kTop);
    EXPECT_LE(sum / static_cast<double>(compared), 2 * golden_.mean_tolerance);
    EXPECT_LE(max, 2 * golden_.max_tolerance);
  }

  const TestDir dir_;
  Golden golden_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_P(Family, IsServedAsItsGoldensSayAndWithTheSameBitsInEachLane) {
  // 1,000 tokens: beyond each window, and several chunks. With AddressSanitizer they are minutes.
  const GoldenCase& golden_case =
      kSanitized ? *std::find_if(golden_.cases.begin(), golden_.cases.end(),
                                 [](const GoldenCase& c) { return c.token_ids.size() == 65; })
                 : golden_.cases.back();
  const auto ask = [&](const Shares& shares) {
    v1::GenerateRequest request = Ask(golden_case.token_ids, kFamilyAnswer);
    request.mutable_logprobs()->set_num_top(kTop);
    Place(request, shares);
    return request;
  };
  const Generation resident = client().Generate(ask(AllResident()));
  ASSERT_TRUE(resident.status.ok()) << resident.status;
  ASSERT_EQ(resident.tokens.size(), static_cast<size_t>(kFamilyAnswer));
  CompareWithGolden(golden_case, resident);
  const struct {
    Shares shares;
    v1::Lane lane;
  } others[] = {{AllFetched(), v1::LANE_FETCHED},
                {{{v1::LANE_IN_PLACE, 1}}, v1::LANE_IN_PLACE},
                {ResidentShare(0.5), v1::LANE_FETCHED}};
  for (const auto& [shares, lane] : others) {
    SCOPED_TRACE(v1::Lane_Name(lane));
    // True, and not because both ran the same way: on a machine that is busy the store may be too late
    // and is not asked for a while.
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
      const Generation other = client().Generate(ask(shares));
      EXPECT_EQ(Difference(other, resident), "");
      return other.LaneBytes(lane) > 0;
    }));
  }
}

TEST_P(Family, ItsChatsAreTheTextsThatItsTemplateMakes) {
  v1::GenerateRequest chat = Ask({}, 8);
  for (const auto& [role, content] : {std::pair("system", "say ab"), {"user", "Größe? 東京"}}) {
    v1::ChatMessage* const message = chat.mutable_chat()->add_messages();
    message->set_role(role);
    message->set_content(content);
  }
  v1::GenerateRequest text = Ask({}, 8);
  text.set_prompt(
      "<|im_start|>system\nsay ab<|im_end|>\n<|im_start|>user\nGröße? 東京<|im_end|>\n"
      "<|im_start|>assistant\n");
  const Generation of_chat = client().Generate(chat), of_text = client().Generate(text);
  EXPECT_EQ(Difference(of_chat, of_text), "");
  EXPECT_GT(of_chat.accepted.prompt_token_ids_size(), 20);
  EXPECT_EQ(of_chat.text, of_text.text);
}

INSTANTIATE_TEST_SUITE_P(All, Family,
                         testing::Values("mistral_gqa2_d128_window", "qwen2_gqa3_d64_window",
                                         "qwen3_gqa2_d128", "gemma2_gqa2_d256"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace headroom
