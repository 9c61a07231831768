// Clients that ask for much, leave, do not read or take another's id: what they cost nobody else.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <vector>

#include "tests/unit/services/coordinator/coordinator_server_fixture.h"

namespace headroom::coordinator {
namespace {

class CoordinatorClientsTest : public CoordinatorServerFixture {};

// More of them than there are threads for calls; each takes as long as a few hundred calls of the other kind.
TEST_F(CoordinatorClientsTest, LongTextsHoldUpNobodyElse) {
  StartServer();  // without peers nothing limits a text but the message
  struct Call {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    v1::TokenizeResponse response;
  };
  constexpr int kCalls = 12;
  std::vector<Call> calls(kCalls);
  std::atomic<int> done{0};
  for (Call& call : calls) {
    call.request.set_text(std::string(1 << 19, 'a'));
    api_->async()->Tokenize(&call.context, &call.request, &call.response, [&](const grpc::Status& status) {
      EXPECT_TRUE(status.ok()) << status.error_message();
      ++done;
    });
  }
  ASSERT_TRUE(Eventually([&] { return done.load() > 0; }));
  v1::GetServerInfoResponse info;
  EXPECT_TRUE(api_->GetServerInfo(Context().get(), v1::GetServerInfoRequest(), &info).ok());
  v1::TokenizeRequest shorter;
  shorter.set_text("a");
  v1::TokenizeResponse ids;
  EXPECT_TRUE(api_->Tokenize(Context().get(), shorter, &ids).ok());
  EXPECT_LT(done.load(), kCalls / 2);
  EXPECT_TRUE(Eventually([&] { return done.load() == kCalls; }));
}

TEST_F(CoordinatorClientsTest, AClientThatLeavesFreesItsMemory) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  const auto context = Context();
  auto stream = api_->Generate(context.get(), Ids(100, 5000));
  v1::GenerateResponse event;
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(stream->Read(&event));
  context->TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(Eventually([this] {
    MutexLock lock(&machine_->mutex);
    return machine_->stored.empty();
  }));
}

TEST_F(CoordinatorClientsTest, AClientThatDoesNotReadHoldsUpNobodyAndNothing) {
  Start();
  const auto slow_context = Context();
  v1::GenerateRequest request = Ids(100, 4000);
  request.mutable_logprobs()->set_num_top(20);
  auto slow = api_->Generate(slow_context.get(), request);
  v1::GenerateOnceResponse response;
  const v1::GenerateRequest other = Ids(200, 200);
  ASSERT_TRUE(Once(other, &response).ok());
  EXPECT_EQ(response.tokens_size(), 200);
  // The slow one gets everything in the end.
  int64_t tokens = 0;
  for (v1::GenerateResponse event; slow->Read(&event);) tokens += event.delta().tokens_size();
  EXPECT_EQ(tokens, 4000);
}

TEST_F(CoordinatorClientsTest, AbortEndsARequestByItsId) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  const auto context = Context();
  context->AddMetadata("x-request-id", "long");
  auto stream = api_->Generate(context.get(), Ids(100, 5000));
  v1::GenerateResponse event;
  ASSERT_TRUE(stream->Read(&event));
  v1::AbortRequest abort;
  abort.set_request_id("long");
  v1::AbortResponse aborted;
  ASSERT_TRUE(api_->Abort(Context().get(), abort, &aborted).ok());
  while (stream->Read(&event)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(event.finished().reason(), v1::FINISH_REASON_CANCELLED);
}

// A call that was refused, since another has its id, may be cancelled: that is not the other's end.
TEST_F(CoordinatorClientsTest, ACancelledDuplicateLeavesWhoHasTheId) {
  machine_->step_time = absl::Milliseconds(5);
  Start();
  const auto context = Context();
  context->AddMetadata("x-request-id", "job");
  auto stream = api_->Generate(context.get(), Ids(100, 5000));
  v1::GenerateResponse event;
  ASSERT_TRUE(stream->Read(&event));
  for (int i = 0; i < 200; ++i) {
    grpc::ClientContext duplicate;
    duplicate.AddMetadata("x-request-id", "job");
    duplicate.set_deadline(std::chrono::system_clock::now() + std::chrono::microseconds(200 + 20 * i));
    if (i % 2 == 0) {
      v1::GenerateOnceRequest once;
      *once.mutable_request() = Ids(100, 5000);
      v1::GenerateOnceResponse response;
      EXPECT_FALSE(api_->GenerateOnce(&duplicate, once, &response).ok());
    } else {
      auto refused = api_->Generate(&duplicate, Ids(100, 5000));
      v1::GenerateResponse nothing;
      while (refused->Read(&nothing)) {
      }
      EXPECT_FALSE(refused->Finish().ok());
    }
  }
  v1::AbortRequest abort;
  abort.set_request_id("job");
  v1::AbortResponse aborted;
  ASSERT_TRUE(api_->Abort(Context().get(), abort, &aborted).ok());
  while (stream->Read(&event)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(event.finished().reason(), v1::FINISH_REASON_CANCELLED);
}

}  // namespace
}  // namespace headroom::coordinator
