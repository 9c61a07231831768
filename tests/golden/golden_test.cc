// The executor on the CPU device against transformers' float32, logit by logit: random tiny models of each
// family over GQA groups, head sizes, tied embeddings, RoPE scaling and windows, with keys in each lane
// and prompts cut in several ways.
#include "tests/golden/golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/common/sha256.h"
#include "tests/common/worker_harness.h"
#include "tests/golden/logit_tap.h"

namespace headroom {
namespace {

constexpr int64_t kWholePrompt = int64_t{1} << 30;
// At most so much of the error that transformers' own bfloat16 has.
constexpr double kOfBfloat16 = 1.2;
constexpr uint64_t kResidentPlan = 1, kFetchedPlan = 2, kMixedPlan = 3,
                   kInPlacePlan = 4;

std::string DataDir() {
  const char* root = std::getenv("HEADROOM_SOURCE_DIR");
  return absl::StrCat(root == nullptr ? "." : root, "/tests/golden/data");
}

std::vector<std::string> Names() {
  const absl::StatusOr<std::vector<std::string>> names = GoldenNames(DataDir());
  return names.ok() ? *names : std::vector<std::string>();
}

class GoldenTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    absl::StatusOr<Golden> golden = ReadGolden(DataDir(), GetParam());
    ASSERT_TRUE(golden.ok()) << golden.status();
    golden_ = *std::move(golden);
    auto folder = RandomModelFolder::Create(golden_.spec);
    ASSERT_TRUE(folder.ok()) << folder.status();
    folder_ = *std::move(folder);
    const auto sha256 = Sha256OfFile(folder_->path() + "/model.safetensors");
    ASSERT_TRUE(sha256.ok()) << sha256.status();
    ASSERT_EQ(*sha256, golden_.model_sha256) << "not the model that the goldens were made with";

    ASSERT_NO_FATAL_FAILURE(Start(/*as_for_gpu=*/false));
  }

  void Start(bool as_for_gpu) {
    WorkerHarnessOptions options;
    options.attend_as_for_gpu = as_for_gpu;
    options.budget_bytes = int64_t{512} << 20;  // a prompt of 1,000 tokens is one chunk on a GPU, too
    options.segment_bytes = int64_t{32} << 20;
    options.compute_threads = 1;
    options.attend_threads = 1;
    options.wrap_device = [this](std::unique_ptr<Device> device) {
      auto tap = std::make_unique<LogitTap>(
          std::move(device), golden_.cases.back().token_ids.size(), golden_.spec.vocab_size);
      tap_ = tap.get();
      return tap;
    };
    harness_.reset();
    auto harness = WorkerHarness::Create(folder_->path(), options);
    ASSERT_TRUE(harness.ok()) << harness.status();
    harness_ = *std::move(harness);
    const KvGeometry geometry = harness_->geometry();
    ASSERT_TRUE(harness_->executor().PreparePlan(ResidentPlan(kResidentPlan, geometry)).ok());
    ASSERT_TRUE(harness_->executor().PreparePlan(FetchedPlan(kFetchedPlan, geometry)).ok());
    ASSERT_TRUE(harness_->executor().PreparePlan(InPlacePlan(kInPlacePlan, geometry)).ok());
    ASSERT_TRUE(harness_->executor()
                    .PreparePlan(WholeHeadPlan(kMixedPlan, geometry,
                                               [](int32_t layer, int32_t kv_head) {
                                                 return (layer + kv_head) % 2 == 0
                                                            ? Lane::kFetched
                                                            : Lane::kResident;
                                               }))
                    .ok());
  }

  // Runs one case and compares the logits at its positions.
  void Check(const GoldenCase& golden_case, uint64_t plan_version, int64_t chunk_tokens) {
    SCOPED_TRACE(absl::StrCat(golden_case.token_ids.size(), " tokens, plan ", plan_version,
                              ", chunks of ", chunk_tokens));
    harness_->set_segment_used(0);
    tap_->Clear();
    TestRequest request;
    request.prompt = golden_case.token_ids;
    request.chunk_tokens = chunk_tokens;
    request.num_draws = 1;
    RunOptions options;
    options.plan_version = plan_version;
    const absl::StatusOr<TestOutput> output = harness_->RunOne(request, options);
    ASSERT_TRUE(output.ok()) << output.status();
    const int64_t length = static_cast<int64_t>(golden_case.token_ids.size());
    ASSERT_EQ(tap_->rows(), length);
    std::vector<float> logits;
    for (const int32_t position : golden_case.positions) {
      const std::span<const float> row = tap_->row(position);
      logits.insert(logits.end(), row.begin(), row.end());
    }
    const GoldenError error = ErrorAgainst(golden_case, logits);
    EXPECT_LE(error.mean, golden_.mean_tolerance);
    EXPECT_LE(error.max, golden_.max_tolerance);
    EXPECT_LE(error.mean, kOfBfloat16 * golden_case.bfloat16_error.mean);
    EXPECT_LE(error.max, kOfBfloat16 * golden_case.bfloat16_error.max);
    worst_.mean = std::max(worst_.mean, error.mean);
    worst_.max = std::max(worst_.max, error.max);

    // Keys were where the plan has them, or the lane was not tested at all.
    int64_t bytes[kNumLanes] = {};
    for (const StepRecord& step : harness_->steps()) {
      for (int lane = 0; lane < kNumLanes; ++lane) bytes[lane] += step.result.lanes[lane].bytes;
    }
    const bool elsewhere = plan_version != kResidentPlan && chunk_tokens < length;
    const Lane lane = plan_version == kInPlacePlan ? Lane::kInPlace : Lane::kFetched;
    const int64_t lane_bytes = bytes[static_cast<int>(lane)];
    if (elsewhere && length > kTailTokens) {
      EXPECT_GT(lane_bytes, 0);
    } else if (!elsewhere || length <= kBlockTokens + 1) {
      EXPECT_EQ(lane_bytes, 0);
    }
  }

  Golden golden_;
  std::unique_ptr<RandomModelFolder> folder_;
  std::unique_ptr<WorkerHarness> harness_;
  LogitTap* tap_ = nullptr;  // the harness's device
  GoldenError worst_;
};

// With AddressSanitizer a step takes twenty times as long: there the long prompt goes one way only, for
// one GQA ratio.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kLongPrompt = 100;
#else
constexpr size_t kLongPrompt = std::numeric_limits<size_t>::max();
#endif

TEST_P(GoldenTest, LogitsAgreeInEachLaneAndChunking) {
  for (const GoldenCase& golden_case : golden_.cases) {
    if (golden_case.token_ids.size() > kLongPrompt) {
      if (golden_.spec.num_q_heads == 3 * golden_.spec.num_kv_heads) {
        Check(golden_case, kMixedPlan, 256);
      }
      continue;
    }
    for (const int64_t chunk_tokens : {kWholePrompt, int64_t{64}}) {
      Check(golden_case, kResidentPlan, chunk_tokens);
      Check(golden_case, kFetchedPlan, chunk_tokens);
    }
    Check(golden_case, kMixedPlan, 64);
    Check(golden_case, kInPlacePlan, 6);  // few enough to go in place
    Check(golden_case, kFetchedPlan, 1);  // every token a decode step
  }
  RecordProperty("mean_error", absl::StrCat(worst_.mean));
  RecordProperty("max_error", absl::StrCat(worst_.max));
}

// Where the worker has a GPU the store multiplies bfloat16 in tiles, and the worker goes on from its states.
// For one GQA ratio: portable tiles take 5 s a model.
class GoldenAsForAGpuTest : public GoldenTest {};
TEST_P(GoldenAsForAGpuTest, LogitsAgreeInPlace) {
  if (OnGpu()) GTEST_SKIP() << "the test above is this one there";
  ASSERT_NO_FATAL_FAILURE(Start(/*as_for_gpu=*/true));
  for (const GoldenCase& golden_case : golden_.cases) {
    if (golden_case.token_ids.size() > kLongPrompt) continue;
    Check(golden_case, kInPlacePlan, 6);
  }
}

INSTANTIATE_TEST_SUITE_P(Data, GoldenTest, testing::ValuesIn(Names()),
                         [](const auto& info) { return info.param; });
INSTANTIATE_TEST_SUITE_P(Data, GoldenAsForAGpuTest,
                         testing::Values("gqa3_d128_scaled", "gqa3_d64_tied", "qwen2_gqa3_d64_window"),
                         [](const auto& info) { return info.param; });

// Without these a folder that is lost would pass.
TEST(Goldens, CoverWhatTheyPromise) {
  const std::vector<std::string> names = Names();
  std::set<int64_t> groups, head_dims;
  std::set<std::string> architectures, windowed;
  bool tied[2] = {}, scaled[2] = {};
  for (const std::string& name : names) {
    const absl::StatusOr<Golden> golden = ReadGolden(DataDir(), name);
    ASSERT_TRUE(golden.ok()) << golden.status();
    groups.insert(golden->spec.num_q_heads / golden->spec.num_kv_heads);
    head_dims.insert(golden->spec.head_dim);
    architectures.insert(golden->spec.architecture);
    const int64_t window = golden->spec.sliding_window.value_or(0);
    if (window != 0) windowed.insert(golden->spec.architecture);
    tied[golden->spec.tie_word_embeddings] = scaled[golden->spec.rope_scaling.has_value()] = true;
    EXPECT_EQ(golden->mean_tolerance, 0.02);
    EXPECT_EQ(golden->max_tolerance, 0.2);
    std::vector<size_t> lengths;
    for (const GoldenCase& golden_case : golden->cases) {
      lengths.push_back(golden_case.token_ids.size());
      EXPECT_GE(golden_case.logits_std, 2);
    }
    std::set<int64_t> expected = {1, 2, 63, 64, 65, 1000};
    if (window != 0) expected.insert({window - 1, window, window + 1});
    EXPECT_EQ(lengths, (std::vector<size_t>(expected.begin(), expected.end()))) << name;
  }
  EXPECT_EQ(architectures,
            (std::set<std::string>{"Gemma2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
                                   "Qwen2ForCausalLM", "Qwen3ForCausalLM"}));
  EXPECT_EQ(windowed, (std::set<std::string>{"Gemma2ForCausalLM", "MistralForCausalLM",
                                             "Qwen2ForCausalLM"}));
  EXPECT_EQ(groups, (std::set<int64_t>{1, 2, 3, 4, 5, 7, 8}));
  EXPECT_EQ(head_dims, (std::set<int64_t>{64, 128, 256}));
  EXPECT_TRUE(tied[false] && tied[true] && scaled[false] && scaled[true]);
}

}  // namespace
}  // namespace headroom
