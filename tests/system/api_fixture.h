// The public API over three processes, one cluster for all tests of a suite.
#ifndef HEADROOM_TESTS_SYSTEM_API_FIXTURE_H_
#define HEADROOM_TESTS_SYSTEM_API_FIXTURE_H_

#include <gtest/gtest.h>
#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "common/errors.h"
#include "tests/system/test_env.h"

namespace headroom {

class ApiFixture : public testing::Test {
 protected:
  static void SetUpTestSuite() { cluster_ = std::make_unique<Cluster>(); }
  static void TearDownTestSuite() { cluster_.reset(); }
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(cluster_->AwaitServing());
    worker_pid_ = cluster_->worker().pid();
  }
  // Whatever a test did: nothing is left of it, no process has died, and the next answer is right.
  void TearDown() override {
    EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10))) << client().Load().ShortDebugString();
    EXPECT_TRUE(cluster_->worker().running());
    EXPECT_TRUE(cluster_->kvstore().running());
    EXPECT_TRUE(cluster_->coordinator().running());
    EXPECT_EQ(cluster_->worker().pid(), worker_pid_);
    const Generation generation = client().Generate(Ask(RandomPrompt(99, 70), 4));
    EXPECT_EQ(generation.tokens.size(), 4u) << generation.status;
  }

  static const TestClient& client() { return cluster_->client(); }
  static v1::InferenceService::Stub& api() { return client().api(); }
  // A request that would take very much longer than any test.
  static v1::GenerateRequest Endless() {
    v1::GenerateRequest request = Ask(RandomPrompt(5, 100), 8000);
    request.clear_logprobs();
    return request;
  }
  // The field that the server complains of, or what it says instead.
  static std::string Complaint(const v1::GenerateRequest& request) {
    const absl::Status status = client().GenerateOnce(request).status;
    const std::vector<FieldViolation> violations = FieldViolationsOf(status);
    if (!absl::IsInvalidArgument(status) || violations.size() != 1) return status.ToString();
    return violations[0].field;
  }

  static inline std::unique_ptr<Cluster> cluster_;
  pid_t worker_pid_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_SYSTEM_API_FIXTURE_H_
