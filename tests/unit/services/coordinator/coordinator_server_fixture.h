// A coordinator that serves on sockets before a worker and a store that keep the protocol.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_COORDINATOR_SERVER_FIXTURE_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_COORDINATOR_SERVER_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "headroom/v1/admin.grpc.pb.h"
#include "headroom/v1/inference.grpc.pb.h"
#include "services/coordinator/coordinator_server.h"
#include "tests/common/byte_tokenizer.h"
#include "tests/common/eventually.h"
#include "tests/unit/services/coordinator/fake_servers.h"

namespace headroom::coordinator {

class CoordinatorServerFixture : public testing::Test {
 protected:
  void SetUp() override {
    char folder[] = "/tmp/headroom_coordinator_XXXXXX";
    ASSERT_NE(mkdtemp(folder), nullptr);
    dir_ = folder;
    std::ofstream(absl::StrCat(dir_, "/config.json"))
        << R"({"architectures": ["LlamaForCausalLM"], "eos_token_id": 2})";
    std::ofstream(absl::StrCat(dir_, "/generation_config.json"))
        << R"({"eos_token_id": 2, "temperature": 0.7, "top_k": 5000})";
    ASSERT_TRUE(WriteByteTokenizer(kFakeVocab, 8192, dir_).ok());
    worker_address_ = absl::StrCat("unix:", dir_, "/worker.sock");
    store_address_ = absl::StrCat("unix:", dir_, "/store.sock");
  }
  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown();
    worker_.reset();
    store_.reset();
    EXPECT_EQ(machine_->violations(), std::vector<std::string>());
    for (const char* file :
         {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}) {
      remove(absl::StrCat(dir_, "/", file).c_str());
    }
    rmdir(dir_.c_str());
  }

  void StartPeers() {
    worker_ = std::make_unique<FakeWorkerServer>(machine_, worker_address_);
    store_ = std::make_unique<FakeStoreServer>(machine_, store_address_);
  }
  void StartServer(CoordinatorOptions options = {}) {
    options.listen_address = absl::StrCat("unix:", dir_, "/api.sock");
    options.admin_address = absl::StrCat("unix:", dir_, "/admin.sock");
    options.worker_address = worker_address_;
    options.store_address = store_address_;
    options.model_dir = dir_;
    absl::StatusOr<std::unique_ptr<CoordinatorServer>> server = StartCoordinator(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    grpc::ChannelArguments args;
    args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    api_ = v1::InferenceService::NewStub(grpc::CreateCustomChannel(
        server_->listen_address(), grpc::InsecureChannelCredentials(), args));
    admin_ = v1::AdminService::NewStub(grpc::CreateCustomChannel(
        server_->admin_address(), grpc::InsecureChannelCredentials(), args));
  }
  void Start() {
    StartPeers();
    StartServer();
    ASSERT_TRUE(Eventually([this] { return server_->serving(); }));
  }
  static std::unique_ptr<grpc::ClientContext> Context() {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    return context;
  }
  static v1::GenerateRequest Ids(int64_t tokens, int32_t max_tokens) {
    v1::GenerateRequest request;
    for (int64_t i = 0; i < tokens; ++i) {
      request.mutable_token_ids()->add_ids(static_cast<int32_t>(i * 7 % kFakeVocab));
    }
    request.mutable_stopping()->set_max_tokens(max_tokens);
    request.mutable_stopping()->set_ignore_eos(true);
    return request;
  }
  static std::vector<int32_t> PromptOf(const v1::GenerateRequest& request) {
    return {request.token_ids().ids().begin(), request.token_ids().ids().end()};
  }
  absl::Status Once(const v1::GenerateRequest& request, v1::GenerateOnceResponse* response) {
    v1::GenerateOnceRequest once;
    *once.mutable_request() = request;
    const auto context = Context();
    return FromGrpcStatus(api_->GenerateOnce(context.get(), once, response));
  }
  // The field that the server complains of.
  std::string Complaint(const v1::GenerateRequest& request) {
    v1::GenerateOnceResponse response;
    const absl::Status status = Once(request, &response);
    const std::vector<FieldViolation> violations = FieldViolationsOf(status);
    if (!absl::IsInvalidArgument(status) || violations.empty()) return status.ToString();
    return violations[0].field;
  }

  std::string dir_, worker_address_, store_address_;
  const std::shared_ptr<FakeMachine> machine_ = std::make_shared<FakeMachine>();
  std::unique_ptr<FakeWorkerServer> worker_;
  std::unique_ptr<FakeStoreServer> store_;
  std::unique_ptr<CoordinatorServer> server_;
  std::unique_ptr<v1::InferenceService::Stub> api_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_COORDINATOR_SERVER_FIXTURE_H_
