// The real model under a budget that offloads most of its KV heads: the worker keeps to it.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kBudgetMiB = 340;
constexpr int64_t kBesideMiB = 200;

TEST(Memory, TheWorkerStaysWithinItsBudgetAndWhatAProcessTakes) {
  if (kSanitized) GTEST_SKIP() << "sanitizers take memory of their own";
  const char* const model = getenv("HEADROOM_MODEL_DIR");
  ASSERT_TRUE(model != nullptr && std::filesystem::exists(absl::StrCat(model, "/config.json")))
      << "HEADROOM_MODEL_DIR: run scripts/fetch_model";
  ClusterOptions options;
  options.model_dir = model;
  options.gpu_memory = absl::StrCat(kBudgetMiB, "MiB");
  options.host_memory = "256MiB";
  options.worker_args = {"--threads", "2"};
  Cluster cluster(options);
  MemorySampler sampler(cluster.worker().pid());
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());

  v1::GenerateRequest request = Ask({}, 48);
  std::string document;
  for (int i = 0; i < 300; ++i) absl::StrAppend(&document, "Sentence ", i, " says little. ");
  request.set_prompt(document);
  request.set_explain(true);
  const Generation generation = cluster.client().Generate(request);
  ASSERT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.tokens.size(), 48u);
  EXPECT_GT(generation.finished.usage().prompt_tokens(), 2000);
  EXPECT_LT(generation.KvHeads(v1::LANE_RESIDENT), 1.5) << "of 3: most are offloaded";

  const int64_t peak = sampler.Stop();
  EXPECT_GT(sampler.samples(), 50);
  EXPECT_GT(peak, kBudgetMiB * kMiB / 2) << "the weights alone are more";
  EXPECT_LE(peak, (kBudgetMiB + kBesideMiB) * kMiB);
  const v1::Explanation& explanation = generation.finished.explanation();
  EXPECT_EQ(explanation.budget_bytes(), kBudgetMiB * kMiB);
  EXPECT_LE(explanation.peak_bytes(), explanation.budget_bytes());
  RecordProperty("peak_mib", static_cast<int>(peak / kMiB));
}

}  // namespace
}  // namespace headroom
