// Clients that leave, stop reading, run out of time, come in numbers: that they cost nobody anything.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/system/api_fixture.h"

namespace headroom {
namespace {

class Clients : public ApiFixture {};

TEST_F(Clients, ACancelledRequestFreesItsSequenceAndOthersGoOn) {
  const Generation expected = client().Generate(Ask(RandomPrompt(8, 100), 40));
  const auto context = TestClient::Context();
  const auto stream = api().Generate(context.get(), Endless());
  v1::GenerateResponse event;
  while (stream->Read(&event) && !event.has_delta()) {
  }
  std::thread cancels([&] {
    absl::SleepFor(absl::Milliseconds(20));
    context->TryCancel();
  });
  EXPECT_EQ(Difference(client().Generate(Ask(RandomPrompt(8, 100), 40)), expected), "");
  cancels.join();
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(Clients, ACancelledGenerateOnceFreesItsSequence) {
  const auto context = TestClient::Context();
  std::thread cancels([&] {
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(5)),
                          [] { return client().Load().running_requests() == 1; }));
    context->TryCancel();
  });
  v1::GenerateOnceRequest request;
  *request.mutable_request() = Endless();
  v1::GenerateOnceResponse response;
  EXPECT_EQ(api().GenerateOnce(context.get(), request, &response).error_code(),
            grpc::StatusCode::CANCELLED);
  cancels.join();
}

TEST_F(Clients, AClientThatStopsReadingPausesAndOthersGoOn) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // or its window may grow beyond the whole answer
  const auto own_connection = v1::InferenceService::NewStub(grpc::CreateCustomChannel(
      cluster_->api_address(), grpc::InsecureChannelCredentials(), args));
  const auto context = TestClient::Context(absl::Seconds(60));
  v1::GenerateRequest request = Endless();
  request.mutable_logprobs()->set_num_top(20);  // fills the connection's buffers sooner
  const int64_t before = client().Status().steps();
  const auto stream = own_connection->Generate(context.get(), request);
  v1::GenerateResponse event;
  ASSERT_TRUE(stream->Read(&event));
  // Paused: the count of steps stands still although the request is far from its end.
  int64_t steps = 0;
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    steps = client().Status().steps();
    absl::SleepFor(Patience(absl::Seconds(1)));
    return client().Status().steps() == steps;
  }));
  EXPECT_LT(steps - before, 6000);
  EXPECT_EQ(client().Load().running_requests(), 1);
  const Generation other = client().Generate(Ask(RandomPrompt(9, 100), 20));
  EXPECT_EQ(other.tokens.size(), 20u) << other.status;
  // It wakes up and is served further.
  int tokens = 0;
  while (tokens < 2000 && stream->Read(&event)) tokens += event.delta().tokens_size();
  EXPECT_GE(tokens, 2000);
  context->TryCancel();
}

TEST_F(Clients, ADeadlineEndsARequest) {
  const auto context = TestClient::Context();
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
  const auto stream = api().Generate(context.get(), Endless());
  v1::GenerateResponse event;
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(Clients, ATimeLimitEndsWithWhatThereIs) {
  v1::GenerateRequest request = Endless();
  request.mutable_stopping()->set_time_limit_ms(kSanitized ? 2000 : 300);
  const Generation generation = client().Generate(request);
  EXPECT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.finished.reason(), v1::FINISH_REASON_TIME_LIMIT);
  EXPECT_GT(generation.tokens.size(), 0u);
}

TEST_F(Clients, AbortEndsARequestByItsId) {
  const auto context = TestClient::Context();
  context->AddMetadata("x-request-id", "doomed");
  const auto stream = api().Generate(context.get(), Endless());
  v1::GenerateResponse event;
  while (stream->Read(&event) && !event.has_delta()) {
  }
  v1::AbortRequest abort;
  abort.set_request_id("doomed");
  v1::AbortResponse aborted;
  EXPECT_TRUE(api().Abort(TestClient::Context().get(), abort, &aborted).ok());
  while (stream->Read(&event)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(event.finished().reason(), v1::FINISH_REASON_CANCELLED);
  EXPECT_TRUE(api().Abort(TestClient::Context().get(), abort, &aborted).ok()) << "again";
}

TEST_F(Clients, ManyRequestsQueueAndAllAreServed) {
  std::vector<v1::GenerateRequest> requests;
  for (int i = 0; i < 40; ++i) requests.push_back(Ask(RandomPrompt(100 + i, 20 + 3 * i), 5));
  for (const Generation& generation : client().GenerateAll(requests)) {
    EXPECT_EQ(generation.tokens.size(), 5u) << generation.status;
  }
}

}  // namespace
}  // namespace headroom
