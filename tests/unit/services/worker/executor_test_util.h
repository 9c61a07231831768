// What the executor's tests share: how much of a test a sanitizer gets, versions of plans, a worker that runs
// requests one by one.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tests/common/worker_harness.h"

namespace headroom {

// Under a sanitizer everything takes some twenty times as long: the same paths, less of each.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kThoroughly = false;
#else
inline constexpr bool kThoroughly = true;
#endif

template <typename T>
std::vector<T> Either(std::vector<T> thoroughly, std::vector<T> briefly) {
  return kThoroughly ? thoroughly : briefly;
}
constexpr int Either(int thoroughly, int briefly) { return kThoroughly ? thoroughly : briefly; }

// Plans by what a test has prepared under their versions.
inline constexpr uint64_t kResident = 1;
inline constexpr uint64_t kFetched = 2;
inline constexpr uint64_t kMixed = 3;  // some heads in one lane, some in another
inline constexpr uint64_t kAllInPlace = 4;

class ExecutorTest : public ::testing::Test {
 protected:
  void StartHarness(const RandomModelSpec& spec, const WorkerHarnessOptions& options) {
    harness_.reset();
    auto folder = RandomModelFolder::Create(spec);
    ASSERT_TRUE(folder.ok()) << folder.status();
    folder_ = *std::move(folder);
    RestartHarness(options);
  }
  void RestartHarness(const WorkerHarnessOptions& options) {
    harness_.reset();
    auto harness = WorkerHarness::Create(folder_->path(), options);
    ASSERT_TRUE(harness.ok()) << harness.status();
    harness_ = *std::move(harness);
  }
  void Prepare(Plan plan) {
    const absl::Status status = harness_->executor().PreparePlan(std::move(plan));
    ASSERT_TRUE(status.ok()) << status;
  }

  TestRequest Request(uint64_t seed, int64_t prompt_tokens, int num_draws) {
    TestRequest request;
    request.prompt = RandomTokens(seed, prompt_tokens, harness_->config().vocab);
    request.num_draws = num_draws;
    request.num_top_logprobs = 3;
    return request;
  }
  // Five of other lengths, drawn in other ways, the longest prompt in chunks.
  std::vector<TestRequest> RaggedRequests(int64_t chunk_tokens) {
    std::vector<TestRequest> requests;
    const int64_t lengths[] = {1, 63, 130, 257, Either(600, 320)};
    for (int i = 0; i < 5; ++i) {
      requests.push_back(Request(10 + i, lengths[i], Either(10 + 7 * i, 3 + i)));
      requests.back().temperature = i % 2 == 0 ? 0.0f : 0.8f;
      requests.back().seed = 77 + i;
      requests.back().chunk_tokens = i == 4 ? chunk_tokens : 1000;
    }
    return requests;
  }
  TestOutput Run(const TestRequest& request, const RunOptions& options) {
    harness_->set_segment_used(0);
    auto output = harness_->RunOne(request, options);
    EXPECT_TRUE(output.ok()) << output.status();
    return output.ok() ? *std::move(output) : TestOutput();
  }
  TestOutput Run(const TestRequest& request, uint64_t plan, SealedRule sealed = {}) {
    RunOptions options;
    options.plan_version = plan;
    options.sealed = sealed;
    return Run(request, options);
  }

  std::unique_ptr<RandomModelFolder> folder_;
  std::unique_ptr<WorkerHarness> harness_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_SERVICES_WORKER_EXECUTOR_TEST_UTIL_H_
