// The public API over sockets, before a worker and a store that keep the protocol.
#include "services/coordinator/coordinator_server.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/protobuf_wire.h"
#include "services/coordinator/served_model.h"
#include "tests/unit/services/coordinator/coordinator_server_fixture.h"

namespace headroom::coordinator {
namespace {

class CoordinatorServerTest : public CoordinatorServerFixture {};

TEST_F(CoordinatorServerTest, FilesOfTheModelThatAreWrongAreRefusedByName) {
  struct Case {
    const char* file;
    const char* text;
    const char* word;
  };
  for (const Case& wrong : std::vector<Case>{
           {"config.json", "[]", "object"},
           {"config.json", R"({"architectures": "LlamaForCausalLM"})", "'architectures'"},
           {"config.json", R"({"architectures": [7]})", "'architectures'"},
           {"generation_config.json", "", "JSON"},
           {"generation_config.json", "[]", "object"},
           {"generation_config.json", "\"temperature\"", "object"},
           {"generation_config.json", R"({"temperature": "1"})", "'temperature'"},
           {"generation_config.json", R"({"temperature": -1})", "'temperature'"},
           {"generation_config.json", R"({"temperature": 1e400})", "JSON"},
           {"generation_config.json", R"({"temperature": 1e300})", "'temperature'"},
           {"generation_config.json", R"({"top_k": 4294967296})", "'top_k'"},
           {"generation_config.json", R"({"top_k": 18446744073709551616})", "64 bits"},
           {"generation_config.json", R"({"top_k": 5.5})", "'top_k'"},
           {"generation_config.json", R"({"top_p": 0})", "'top_p'"},
           {"generation_config.json", R"({"min_p": 2})", "'min_p'"},
           {"generation_config.json", R"({"do_sample": "yes"})", "'do_sample'"},
           {"generation_config.json", R"({"eos_token_id": [2, 99999999999]})", "'eos_token_id'"},
           {"tokenizer_config.json", "[]", "object"},
           {"tokenizer.json", R"({"version": "1.0"})", "tokenizer.json"},
       }) {
    const std::string path = absl::StrCat(dir_, "/", wrong.file);
    const std::string kept = absl::StrCat(dir_, "/kept");
    const bool existed = rename(path.c_str(), kept.c_str()) == 0;
    std::ofstream(path) << wrong.text;
    const absl::Status status = ServedModel::Load(dir_).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << wrong.text << ": " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), wrong.word)) << wrong.text << ": " << status;
    EXPECT_FALSE(absl::StrContains(status.message(), "\n")) << status;
    remove(path.c_str());
    if (existed) rename(kept.c_str(), path.c_str());
  }
  EXPECT_TRUE(ServedModel::Load(dir_).ok()) << "nothing is left of them";
  // Where there is no tokenizer, only the defaults of sampling are read from it.
  remove(absl::StrCat(dir_, "/tokenizer.json").c_str());
  std::ofstream(absl::StrCat(dir_, "/generation_config.json")) << "[]";
  EXPECT_TRUE(absl::IsInvalidArgument(ServedModel::Load(dir_).status()));
}

TEST_F(CoordinatorServerTest, StreamsAcceptanceDeltasAndOneEnd) {
  Start();
  const v1::GenerateRequest request = Ids(300, 40);
  const auto context = Context();
  context->AddMetadata("x-request-id", "my-request");
  auto stream = api_->Generate(context.get(), request);
  std::vector<v1::GenerateResponse> events;
  for (v1::GenerateResponse event; stream->Read(&event);) events.push_back(event);
  ASSERT_TRUE(stream->Finish().ok());
  ASSERT_GE(events.size(), 3u);
  EXPECT_EQ(context->GetServerInitialMetadata().find("x-request-id")->second, "my-request");
  EXPECT_EQ(events.front().accepted().request_id(), "my-request");
  EXPECT_EQ(events.front().accepted().prompt_token_ids_size(), 300);
  EXPECT_TRUE(events.front().accepted().has_seed());
  std::vector<int32_t> tokens;
  for (size_t i = 1; i + 1 < events.size(); ++i) {
    ASSERT_TRUE(events[i].has_delta());
    for (const v1::TokenRecord& token : events[i].delta().tokens()) {
      tokens.push_back(token.token_id());
      EXPECT_FALSE(token.has_logprob()) << "nobody asked";
    }
  }
  EXPECT_EQ(tokens, FakeAnswer(PromptOf(request), 40));
  EXPECT_EQ(events.back().finished().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(events.back().finished().usage().completion_tokens(), 40);
  EXPECT_GT(events.back().finished().timings().ttft_ns(), 0);
}

TEST_F(CoordinatorServerTest, TextGoesInAndComesOut) {
  Start();
  v1::GenerateRequest request;
  request.set_prompt("hello world");
  request.mutable_stopping()->set_max_tokens(12);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_logprobs()->set_num_top(0);
  v1::GenerateOnceResponse response;
  ASSERT_TRUE(Once(request, &response).ok());
  ASSERT_EQ(response.tokens_size(), 12);
  EXPECT_TRUE(response.tokens(0).has_logprob());
  v1::DetokenizeRequest detokenize;
  for (const v1::TokenRecord& token : response.tokens()) {
    detokenize.add_token_ids(token.token_id());
  }
  v1::DetokenizeResponse text;
  ASSERT_TRUE(api_->Detokenize(Context().get(), detokenize, &text).ok());
  EXPECT_EQ(response.text(), text.text());
  v1::TokenizeRequest tokenize;
  tokenize.set_text("hello world");
  v1::TokenizeResponse ids;
  ASSERT_TRUE(api_->Tokenize(Context().get(), tokenize, &ids).ok());
  EXPECT_TRUE(std::equal(ids.token_ids().begin(), ids.token_ids().end(),
                         response.prompt_token_ids().begin(), response.prompt_token_ids().end()));
}

TEST_F(CoordinatorServerTest, TokenizeRefusesWhatNoContextHolds) {
  machine_->max_position_tokens = 100;
  Start();
  v1::TokenizeRequest request;
  request.set_text(std::string(100'000, 'a'));
  v1::TokenizeResponse ids;
  const absl::Status status = FromGrpcStatus(api_->Tokenize(Context().get(), request, &ids));
  ASSERT_EQ(FieldViolationsOf(status).size(), 1u) << status;
  EXPECT_EQ(FieldViolationsOf(status)[0].field, "text");
}

TEST_F(CoordinatorServerTest, ChatGoesThroughTheTemplate) {
  Start();
  v1::GenerateRequest request;
  v1::ChatMessage* const message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hi");
  request.mutable_stopping()->set_max_tokens(3);
  v1::GenerateOnceResponse response;
  EXPECT_TRUE(Once(request, &response).ok());
  EXPECT_GT(response.prompt_token_ids_size(), 3);
}

TEST_F(CoordinatorServerTest, NamesTheFieldThatIsWrong) {
  Start();
  v1::GenerateRequest request = Ids(10, 5);
  const auto wrong = [&](auto&& change) {
    v1::GenerateRequest changed = request;
    change(changed);
    return Complaint(changed);
  };
  using R = v1::GenerateRequest;
  EXPECT_EQ(wrong([](R& r) { r.clear_input(); }), "input");
  EXPECT_EQ(wrong([](R& r) { r.mutable_token_ids()->clear_ids(); }), "token_ids.ids");
  EXPECT_EQ(wrong([](R& r) { r.mutable_token_ids()->set_ids(3, kFakeVocab); }), "token_ids.ids[3]");
  EXPECT_EQ(wrong([](R& r) { r.mutable_token_ids()->set_ids(0, -1); }), "token_ids.ids[0]");
  EXPECT_EQ(wrong([](R& r) { r.mutable_sampling()->set_temperature(-1); }), "sampling.temperature");
  EXPECT_EQ(wrong([](R& r) { r.mutable_sampling()->set_temperature(NAN); }),
            "sampling.temperature");
  EXPECT_EQ(wrong([](R& r) { r.mutable_sampling()->set_top_k(kFakeVocab + 1); }), "sampling.top_k");
  EXPECT_EQ(wrong([](R& r) { r.mutable_sampling()->set_top_p(0); }), "sampling.top_p");
  EXPECT_EQ(wrong([](R& r) { r.mutable_sampling()->set_min_p(1.5); }), "sampling.min_p");
  for (const float value : {0.0f, 101.0f, NAN, INFINITY}) {
    EXPECT_EQ(wrong([=](R& r) { r.mutable_sampling()->set_repetition_penalty(value); }),
              "sampling.repetition_penalty");
  }
  for (const float value : {-2.1f, 2.1f, NAN, -INFINITY}) {
    EXPECT_EQ(wrong([=](R& r) { r.mutable_sampling()->set_frequency_penalty(value); }),
              "sampling.frequency_penalty");
    EXPECT_EQ(wrong([=](R& r) { r.mutable_sampling()->set_presence_penalty(value); }),
              "sampling.presence_penalty");
  }
  const auto biased = [&](int32_t id, float bias) {
    return wrong([=](R& r) { (*r.mutable_sampling()->mutable_logit_bias())[id] = bias; });
  };
  for (const float value : {-101.0f, 100.5f, NAN, INFINITY}) {
    EXPECT_EQ(biased(7, value), "sampling.logit_bias[7]");
  }
  EXPECT_EQ(biased(-1, 1), "sampling.logit_bias[-1]");
  EXPECT_EQ(biased(kFakeVocab, 1), absl::StrCat("sampling.logit_bias[", kFakeVocab, "]"));
  EXPECT_EQ(wrong([](R& r) {
              auto& bias = *r.mutable_sampling()->mutable_logit_bias();
              for (int id = 0; id < 1025; ++id) bias[id] = 1;
            }),
            "sampling.logit_bias");
  EXPECT_EQ(wrong([](R& r) { r.mutable_stopping()->set_max_tokens(-1); }), "stopping.max_tokens");
  EXPECT_EQ(wrong([](R& r) { r.mutable_stopping()->set_min_tokens(6); }), "stopping.min_tokens");
  EXPECT_EQ(wrong([](R& r) { r.mutable_stopping()->add_stop_strings(""); }),
            "stopping.stop_strings[0]");
  EXPECT_EQ(wrong([](R& r) { r.mutable_stopping()->add_stop_token_ids(-1); }),
            "stopping.stop_token_ids[0]");
  EXPECT_EQ(wrong([](R& r) { r.mutable_stopping()->set_time_limit_ms(0); }),
            "stopping.time_limit_ms");
  EXPECT_EQ(wrong([](R& r) { r.mutable_logprobs()->set_num_top(21); }), "logprobs.num_top");
  EXPECT_EQ(wrong([](R& r) { r.set_session_id("a b"); }), "session_id");
  EXPECT_EQ(wrong([](R& r) { r.set_session_id(""); }), "session_id");
  EXPECT_EQ(wrong([](R& r) { r.set_cache_salt(std::string(200, 'x')); }), "cache_salt");
  for (const int32_t n : {-1, 0, 17, std::numeric_limits<int32_t>::max()}) {
    EXPECT_EQ(wrong([n](R& r) { r.set_n(n); }), "n");
  }
  EXPECT_EQ(wrong([](R& r) { r.mutable_placement()->set_chunk_tokens(0); }),
            "placement.chunk_tokens");
  EXPECT_EQ(wrong([](R& r) { r.mutable_placement()->add_shares(); }), "placement.shares");
  EXPECT_EQ(wrong([](R& r) {
              r.mutable_placement()->set_mode(v1::PlacementOptions::MODE_SHARES);
              r.mutable_placement()->add_shares()->set_share(1);
            }),
            "placement.shares[0].lane");
  EXPECT_EQ(wrong([](R& r) {
              r.mutable_placement()->set_mode(v1::PlacementOptions::MODE_SHARES);
              v1::LaneShare* const share = r.mutable_placement()->add_shares();
              share->set_lane(v1::LANE_FETCHED);
              share->set_share(0.9);
            }),
            "placement.shares");
  EXPECT_EQ(Complaint(Ids(1 << 16, 5)), "token_ids.ids") << "longer than the context";
}

TEST_F(CoordinatorServerTest, ErrorsCarryTheirReason) {
  Start();
  v1::GenerateRequest request = Ids(10, 5);
  request.set_model("another");
  v1::GenerateOnceResponse response;
  absl::Status status = Once(request, &response);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(status), "MODEL_UNKNOWN");
  v1::GetSessionRequest get;
  get.set_session_id("nobody");
  v1::GetSessionResponse session;
  status = FromGrpcStatus(api_->GetSession(Context().get(), get, &session));
  EXPECT_EQ(ReasonOf(status), "SESSION_UNKNOWN");
  v1::ForkSessionResponse fork;
  status = FromGrpcStatus(api_->ForkSession(Context().get(), v1::ForkSessionRequest(), &fork));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
}

TEST_F(CoordinatorServerTest, SessionsAreListedUpdatedAndDeleted) {
  Start();
  v1::GenerateOnceResponse response;
  for (const char* id : {"a", "b", "c"}) {
    v1::GenerateRequest request = Ids(200, 5);
    request.set_session_id(id);
    ASSERT_TRUE(Once(request, &response).ok());
  }
  v1::ListSessionsRequest list;
  list.set_page_size(2);
  v1::ListSessionsResponse page;
  ASSERT_TRUE(api_->ListSessions(Context().get(), list, &page).ok());
  ASSERT_EQ(page.sessions_size(), 2);
  EXPECT_EQ(page.next_page_token(), "b");
  list.set_page_token("b");
  ASSERT_TRUE(api_->ListSessions(Context().get(), list, &page).ok());
  ASSERT_EQ(page.sessions_size(), 1);
  EXPECT_EQ(page.sessions(0).session_id(), "c");
  EXPECT_EQ(page.next_page_token(), "");
  v1::UpdateSessionRequest update;
  update.set_session_id("a");
  update.set_pinned(true);
  v1::UpdateSessionResponse updated;
  ASSERT_TRUE(api_->UpdateSession(Context().get(), update, &updated).ok());
  EXPECT_TRUE(updated.session().pinned());
  EXPECT_EQ(updated.session().tokens(), 205);
  v1::DeleteSessionRequest drop;
  drop.set_session_id("b");
  v1::DeleteSessionResponse dropped;
  ASSERT_TRUE(api_->DeleteSession(Context().get(), drop, &dropped).ok());
  v1::FlushResponse flushed;
  ASSERT_TRUE(admin_->Flush(Context().get(), v1::FlushRequest(), &flushed).ok());
  EXPECT_EQ(flushed.dropped_sessions(), 2);
}

TEST_F(CoordinatorServerTest, SaysWhatItServesAndHowItIs) {
  Start();
  v1::GetModelInfoResponse model;
  ASSERT_TRUE(api_->GetModelInfo(Context().get(), v1::GetModelInfoRequest(), &model).ok());
  EXPECT_EQ(model.architecture(), "LlamaForCausalLM");
  EXPECT_EQ(model.vocab_size(), kFakeVocab);
  EXPECT_FLOAT_EQ(model.default_sampling().temperature(), 0.7f);
  ASSERT_EQ(model.eos_token_ids_size(), 1);
  EXPECT_TRUE(model.has_chat_template());
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(api_->GetServerInfo(Context().get(), v1::GetServerInfoRequest(), &info).ok());
  EXPECT_EQ(info.device(), "fake");
  v1::GetLoadResponse load;
  ASSERT_TRUE(api_->GetLoad(Context().get(), v1::GetLoadRequest(), &load).ok());
  EXPECT_EQ(load.running_requests(), 0);
  v1::GetStatusResponse status;
  ASSERT_TRUE(admin_->GetStatus(Context().get(), v1::GetStatusRequest(), &status).ok());
  ASSERT_EQ(status.processes_size(), 3);
  for (const v1::ProcessStatus& process : status.processes()) {
    EXPECT_TRUE(process.connected()) << process.name();
    EXPECT_FALSE(process.address().empty());
  }
}

TEST_F(CoordinatorServerTest, StatusTellsWhatTheWorkerDoesBetweenSteps) {
  machine_->registered_host_bytes = 1 << 20;
  machine_->plans_built = machine_->plans_at_start = 40;
  Start();
  v1::GetStatusResponse status;
  const auto says = [&](int64_t registered, int64_t built) {
    return Eventually([&] {
      return admin_->GetStatus(Context().get(), v1::GetStatusRequest(), &status).ok() &&
             status.device_memory().registered_host_bytes() == registered &&
             status.plans_built() == built && status.plans_at_start() == 40;
    });
  };
  EXPECT_TRUE(says(1 << 20, 40)) << status.DebugString();
  machine_->registered_host_bytes = 3 << 20;
  machine_->plans_built = 41;
  EXPECT_TRUE(says(3 << 20, 41)) << status.DebugString();
  EXPECT_EQ(status.steps(), 0);
}

TEST_F(CoordinatorServerTest, ServesOnlyWhileWorkerAndStoreAreThere) {
  StartServer();
  v1::GenerateOnceResponse response;
  absl::Status status = Once(Ids(10, 5), &response);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(status), "NOT_READY");
  EXPECT_FALSE(server_->serving());
  StartPeers();
  ASSERT_TRUE(Eventually([this] { return server_->serving(); }));
  EXPECT_TRUE(Once(Ids(10, 5), &response).ok());
  worker_.reset();
  ASSERT_TRUE(Eventually([this] { return !server_->serving(); }));
  worker_ = std::make_unique<FakeWorkerServer>(machine_, worker_address_);
  response.Clear();
  EXPECT_TRUE(Once(Ids(10, 5), &response).ok()) << "it waits for the worker";
  EXPECT_EQ(response.tokens_size(), 5);
}

// grpc.health.v1.Health/Check by hand: 1 is SERVING, 2 NOT_SERVING, -1 an unknown service.
TEST_F(CoordinatorServerTest, HealthFollowsWorkerAndStore) {
  StartServer();
  grpc::GenericStub stub(
      grpc::CreateChannel(server_->listen_address(), grpc::InsecureChannelCredentials()));
  const auto health = [&](const std::string& service) -> int64_t {
    std::string request;
    wire::PutBytes(1, service, request);
    const grpc::Slice slice(request);
    grpc::ByteBuffer asked(&slice, 1), answered;
    const auto context = Context();
    Mutex mutex;
    CondVar condition;
    std::optional<grpc::Status> status;
    stub.UnaryCall(context.get(), "/grpc.health.v1.Health/Check", grpc::StubOptions(), &asked,
                   &answered, [&](const grpc::Status& result) {
                     MutexLock lock(&mutex);
                     status = result;
                     condition.SignalAll();
                   });
    MutexLock lock(&mutex);
    while (!status.has_value()) condition.WaitFor(&mutex, absl::Seconds(1));
    if (!status->ok()) return -1;
    grpc::Slice response;
    if (!answered.DumpToSingleSlice(&response).ok()) return -1;
    wire::Reader reader(absl::string_view(reinterpret_cast<const char*>(response.begin()),
                                          response.size()));
    return reader.Next() ? reader.integer() : 0;
  };
  for (const char* service : {"", "headroom.v1.InferenceService"}) {
    EXPECT_EQ(health(service), 2) << service;
  }
  EXPECT_EQ(health("nobody"), -1);
  StartPeers();
  EXPECT_TRUE(Eventually([&] { return health("") == 1; }));
  EXPECT_EQ(health("headroom.v1.InferenceService"), 1);
  {
    MutexLock lock(&machine_->mutex);
    machine_->store_away = true;
  }
  EXPECT_TRUE(Eventually([&] { return health("headroom.v1.InferenceService") == 2; }));
}

TEST_F(CoordinatorServerTest, AWorkerThatDiesInTheMiddleIsOnlyAPause) {
  machine_->step_time = absl::Milliseconds(2);
  Start();
  const v1::GenerateRequest request = Ids(300, 300);
  const auto context = Context();
  auto stream = api_->Generate(context.get(), request);
  std::vector<int32_t> tokens;
  int events = 0;
  for (v1::GenerateResponse event; stream->Read(&event);) {
    for (const v1::TokenRecord& token : event.delta().tokens()) tokens.push_back(token.token_id());
    if (++events != 20) continue;
    worker_.reset();
    worker_ = std::make_unique<FakeWorkerServer>(machine_, worker_address_);
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(tokens, FakeAnswer(PromptOf(request), 300));
  MutexLock lock(&machine_->mutex);
  int opened = 0;
  for (const v1::StepRequest& step : machine_->sent) opened += step.open_sequences_size();
  EXPECT_EQ(opened, 2) << "once at each worker";
}

TEST_F(CoordinatorServerTest, DrainsByAdminCall) {
  Start();
  v1::DrainResponse drained;
  ASSERT_TRUE(admin_->Drain(Context().get(), v1::DrainRequest(), &drained).ok());
  EXPECT_FALSE(server_->serving());
  v1::GenerateOnceResponse response;
  EXPECT_EQ(ReasonOf(Once(Ids(10, 5), &response)), "DRAINING");
}

TEST(CoordinatorOptions, AWrongOneStopsTheStart) {
  CoordinatorOptions options;
  EXPECT_EQ(StartCoordinator(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.listen_address = options.worker_address = options.store_address = "unix:/tmp/none.sock";
  options.model_dir = "/nonexistent";
  EXPECT_EQ(StartCoordinator(options).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace headroom::coordinator
