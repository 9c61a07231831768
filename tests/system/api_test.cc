// The public API over three processes: what it answers and what it refuses.
#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "tests/system/api_fixture.h"

namespace headroom {
namespace {

class Api : public ApiFixture {};

// ---------------------------------------------------------------- what it answers

TEST_F(Api, StreamsOneAcceptanceDeltasAndOneEnd) {
  const std::vector<int32_t> prompt = RandomPrompt(1, 150);
  const Generation generation = client().Generate(Ask(prompt, 30));
  ASSERT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.accepted_events, 1);
  EXPECT_FALSE(generation.accepted.request_id().empty());
  EXPECT_TRUE(generation.accepted.has_seed());
  EXPECT_EQ(std::vector<int32_t>(generation.accepted.prompt_token_ids().begin(),
                                 generation.accepted.prompt_token_ids().end()),
            prompt);
  EXPECT_EQ(generation.tokens.size(), 30u);
  const v1::Finished& finished = generation.finished;
  EXPECT_EQ(finished.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(finished.usage().prompt_tokens(), 150);
  EXPECT_EQ(finished.usage().cached_tokens(), 0);
  EXPECT_EQ(finished.usage().completion_tokens(), 30);
  EXPECT_GT(finished.timings().prefill_ns(), 0);
  EXPECT_GT(finished.timings().decode_ns(), 0);
  EXPECT_GT(finished.timings().tpot_ns(), 0);
  EXPECT_GE(finished.timings().ttft_ns(), finished.timings().prefill_ns());
}

TEST_F(Api, GenerateOnceIsGenerateInOneMessage) {
  v1::GenerateRequest request = Ask(RandomPrompt(2, 150), 40);
  Place(request, AllFetched());
  const Generation streamed = client().Generate(request);
  const Generation once = client().GenerateOnce(request);
  EXPECT_EQ(Difference(once, streamed), "");
  EXPECT_EQ(once.text, streamed.text);
  EXPECT_FALSE(once.text.empty());
  EXPECT_EQ(once.finished.reason(), streamed.finished.reason());
  EXPECT_EQ(once.accepted.prompt_token_ids_size(), 150);
}

TEST_F(Api, TextGoesToTokensAndBack) {
  for (const std::string text : {"hello world", "Größe: 5 € – 東京", "a\nb\t\"c\"\\"}) {
    v1::TokenizeRequest tokenize;
    tokenize.set_text(text);
    v1::TokenizeResponse ids;
    ASSERT_TRUE(api().Tokenize(TestClient::Context().get(), tokenize, &ids).ok());
    EXPECT_GT(ids.token_ids_size(), 0);
    v1::DetokenizeRequest detokenize;
    *detokenize.mutable_token_ids() = ids.token_ids();
    v1::DetokenizeResponse back;
    ASSERT_TRUE(api().Detokenize(TestClient::Context().get(), detokenize, &back).ok());
    EXPECT_EQ(back.text(), text);

    v1::GenerateRequest request = Ask({}, 8);
    request.set_prompt(text);
    const Generation generation = client().Generate(request);
    EXPECT_EQ(generation.accepted.prompt_token_ids_size(), ids.token_ids_size());
    detokenize.clear_token_ids();
    for (const int32_t id : generation.ids()) detokenize.add_token_ids(id);
    ASSERT_TRUE(api().Detokenize(TestClient::Context().get(), detokenize, &back).ok());
    EXPECT_EQ(generation.text, back.text());
  }
}

TEST_F(Api, TellsAboutModelAndServer) {
  v1::GetModelInfoResponse model;
  ASSERT_TRUE(
      api().GetModelInfo(TestClient::Context().get(), v1::GetModelInfoRequest(), &model).ok());
  EXPECT_EQ(model.architecture(), "LlamaForCausalLM");
  EXPECT_EQ(model.geometry().num_layers(), 4);
  EXPECT_EQ(model.geometry().num_kv_heads(), 4);
  EXPECT_EQ(model.geometry().head_dim(), 64);
  EXPECT_EQ(model.num_q_heads(), 12);
  EXPECT_EQ(model.vocab_size(), kTestVocab);
  EXPECT_EQ(model.max_context_tokens(), kTestContext);
  EXPECT_EQ(model.kv_bytes_per_token(), kTestTokenBytes);
  EXPECT_TRUE(model.has_chat_template());

  v1::GetServerInfoResponse server;
  ASSERT_TRUE(
      api().GetServerInfo(TestClient::Context().get(), v1::GetServerInfoRequest(), &server).ok());
  EXPECT_FALSE(server.version().empty());
  EXPECT_EQ(server.device_budget_bytes(), 48 << 20);
  EXPECT_EQ(server.host_capacity_bytes(), 64u << 20);
  EXPECT_NE(server.store_generation(), 0u);
  EXPECT_NE(server.worker_incarnation(), 0u);

  const v1::GetLoadResponse load = client().Load();
  EXPECT_EQ(load.device_budget_bytes(), 48 << 20);
  EXPECT_GT(load.device_used_bytes(), 0);
  EXPECT_LE(load.device_used_bytes(), load.device_budget_bytes());
  EXPECT_EQ(load.host_capacity_bytes(), 64u << 20);

  const v1::GetStatusResponse status = client().Status();
  ASSERT_EQ(status.processes_size(), 3);
  for (const v1::ProcessStatus& process : status.processes()) {
    EXPECT_TRUE(process.connected()) << process.name();
    EXPECT_FALSE(process.address().empty()) << process.name();
  }
}

TEST_F(Api, PromptLogprobsAreThoseOfTheSameTokensGenerated) {
  const std::vector<int32_t> prompt = RandomPrompt(3, 300);
  v1::GenerateRequest request = Ask(prompt, 60);
  Place(request, AllFetched());
  const Generation generated = client().Generate(request);
  ASSERT_TRUE(generated.status.ok()) << generated.status;
  std::vector<int32_t> all = prompt;
  const std::vector<int32_t> answer = generated.ids();
  all.insert(all.end(), answer.begin(), answer.end());

  v1::GenerateRequest scoring = Ask(all, 0);
  Place(scoring, AllResident());
  const Generation scored = client().Generate(scoring);
  ASSERT_TRUE(scored.status.ok()) << scored.status;
  EXPECT_EQ(scored.tokens.size(), 0u);
  EXPECT_EQ(scored.finished.reason(), v1::FINISH_REASON_LENGTH);
  ASSERT_EQ(scored.finished.prompt_logprobs_size(), 359);
  for (int i = 0; i < 60; ++i) {
    const v1::TokenRecord& record = scored.finished.prompt_logprobs(299 + i);
    EXPECT_EQ(record.token_id(), answer[i]);
    EXPECT_EQ(std::bit_cast<uint32_t>(record.logprob()),
              std::bit_cast<uint32_t>(generated.tokens[i].logprob()))
        << i;
  }
  // Greedy: the drawn token is the likeliest.
  EXPECT_EQ(generated.tokens[0].top(0).token_id(), answer[0]);
}

TEST_F(Api, StopsAtStringsAndTokens) {
  v1::GenerateRequest request = Ask(RandomPrompt(4, 80), 40);
  const Generation free = client().Generate(request);
  ASSERT_EQ(free.tokens.size(), 40u) << free.status;
  const int32_t eleventh = free.tokens[10].token_id();
  request.mutable_stopping()->add_stop_token_ids(eleventh);
  const Generation stopped = client().Generate(request);
  EXPECT_EQ(stopped.finished.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(stopped.finished.stop().stop_token_id(), eleventh);
  EXPECT_LE(stopped.tokens.size(), 11u);
}

TEST_F(Api, PenaltiesAndBiasChangeWhatIsDrawn) {
  v1::GenerateRequest request = Ask(RandomPrompt(6, 80), 60);
  const Generation plain = client().Generate(request);
  ASSERT_EQ(plain.tokens.size(), 60u) << plain.status;
  const auto distinct = [](const Generation& generation) {
    const std::vector<int32_t> ids = generation.ids();
    return std::set<int32_t>(ids.begin(), ids.end()).size();
  };
  v1::GenerateRequest penalised = request;
  penalised.mutable_sampling()->set_presence_penalty(2);
  penalised.mutable_sampling()->set_frequency_penalty(2);
  EXPECT_GT(distinct(client().Generate(penalised)), distinct(plain));
  // Bias alone: one token always; the log-probabilities are still the model's.
  v1::GenerateRequest biased = request;
  (*biased.mutable_sampling()->mutable_logit_bias())[77] = 100;
  const Generation only = client().Generate(biased);
  EXPECT_EQ(only.ids(), std::vector<int32_t>(60, 77));
  EXPECT_EQ(only.tokens[0].top(0).logprob(), plain.tokens[0].top(0).logprob());
  // What would end the answer is held back.
  v1::GenerateRequest longer = request;
  const int32_t third = plain.tokens[2].token_id();
  longer.mutable_stopping()->add_stop_token_ids(third);
  EXPECT_LE(client().Generate(longer).tokens.size(), 3u);
  longer.mutable_stopping()->set_min_tokens(20);
  const Generation held = client().Generate(longer);
  ASSERT_GE(held.tokens.size(), 20u) << held.status;
  for (size_t i = 0; i < 20; ++i) EXPECT_NE(held.tokens[i].token_id(), third) << i;
}

// ---------------------------------------------------------------- several answers

// The n answers of a stream, each with its one end; `on_event` sees all events.
std::vector<Generation> GenerateAnswers(
    v1::InferenceService::Stub& api, const v1::GenerateRequest& request,
    grpc::ClientContext* context,
    const std::function<void(const v1::GenerateResponse&)>& on_event = nullptr) {
  std::vector<Generation> answers(request.n());
  std::vector<bool> ended(request.n());
  int accepted = 0;
  const auto stream = api.Generate(context, request);
  for (v1::GenerateResponse event; stream->Read(&event);) {
    if (on_event != nullptr) on_event(event);
    accepted += event.has_accepted();
    if (event.has_delta()) {
      Generation& answer = answers.at(event.delta().index());
      EXPECT_FALSE(ended[event.delta().index()]);
      answer.text += event.delta().text();
      answer.tokens.insert(answer.tokens.end(), event.delta().tokens().begin(),
                           event.delta().tokens().end());
    } else if (event.has_finished()) {
      answers.at(event.finished().index()).finished = event.finished();
      EXPECT_FALSE(ended[event.finished().index()]) << "ended twice";
      ended[event.finished().index()] = true;
    }
  }
  const absl::Status status = FromGrpcStatus(stream->Finish());
  for (size_t i = 0; i < answers.size(); ++i) {
    answers[i].status = status;
    EXPECT_EQ(ended[i], status.ok()) << i;
  }
  EXPECT_LE(accepted, 1);
  return answers;
}

TEST_F(Api, EachOfSeveralAnswersIsWhatItsSeedDrawsAlone) {
  v1::GenerateRequest request = Ask(RandomPrompt(11, 200), 24);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(1234);
  request.set_session_id("several");
  v1::GenerateRequest several = request;
  several.set_n(5);
  const std::vector<Generation> answers =
      GenerateAnswers(api(), several, TestClient::Context().get());
  std::set<std::vector<int32_t>> different;
  for (int32_t i = 0; i < several.n(); ++i) {
    ASSERT_TRUE(answers[i].status.ok()) << answers[i].status;
    EXPECT_EQ(answers[i].finished.usage().completion_tokens(), 24);
    EXPECT_EQ(answers[i].finished.prompt_logprobs_size(), i == 0 ? 199 : 0);
    different.insert(answers[i].ids());
  }
  EXPECT_EQ(different.size(), 5u);
  EXPECT_EQ(answers[0].finished.seed(), 1234u);
  v1::GetSessionRequest get;
  get.set_session_id("several");
  v1::GetSessionResponse session;
  ASSERT_TRUE(api().GetSession(TestClient::Context().get(), get, &session).ok());
  EXPECT_EQ(session.session().tokens(), 224) << "the session keeps answer 0";

  v1::GenerateOnceRequest once;
  *once.mutable_request() = several;
  v1::GenerateOnceResponse response;
  const grpc::Status status = api().GenerateOnce(TestClient::Context().get(), once, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.answers_size(), 5);
  EXPECT_FALSE(response.has_finished());
  EXPECT_EQ(response.tokens_size(), 0);

  request.clear_session_id();
  for (int32_t i = 0; i < several.n(); ++i) {
    request.mutable_sampling()->set_seed(answers[i].finished.seed());
    request.mutable_logprobs()->set_prompt(i == 0);
    const Generation alone = client().Generate(request);
    EXPECT_EQ(Difference(alone, answers[i]), "") << i;
    EXPECT_EQ(alone.text, answers[i].text);
    EXPECT_EQ(response.answers(i).text(), alone.text);
    EXPECT_EQ(response.answers(i).tokens_size(), 24);
    EXPECT_EQ(response.answers(i).finished().seed(), answers[i].finished.seed());
  }
  v1::DeleteSessionRequest erase;
  erase.set_session_id("several");
  v1::DeleteSessionResponse erased;
  EXPECT_TRUE(api().DeleteSession(TestClient::Context().get(), erase, &erased).ok());
}

TEST_F(Api, CancelAndAbortEndAllAnswers) {
  v1::GenerateRequest request = Endless();
  request.mutable_stopping()->set_max_tokens(1500);  // four of them fit, and one more request
  request.set_n(4);
  const Generation expected = client().Generate(Ask(RandomPrompt(12, 100), 30));
  for (const bool abort : {false, true}) {
    const auto context = TestClient::Context();
    context->AddMetadata("x-request-id", "four");
    std::set<int32_t> seen;
    bool sent = false;
    const std::vector<Generation> answers = GenerateAnswers(
        api(), request, context.get(), [&](const v1::GenerateResponse& event) {
          if (event.has_delta()) seen.insert(event.delta().index());
          if (seen.size() < 4 || std::exchange(sent, true)) return;
          EXPECT_EQ(client().Load().running_requests(), 4);
          EXPECT_EQ(Difference(client().Generate(Ask(RandomPrompt(12, 100), 30)), expected), "");
          v1::AbortRequest four;
          four.set_request_id("four");
          v1::AbortResponse aborted;
          if (abort) {
            EXPECT_TRUE(api().Abort(TestClient::Context().get(), four, &aborted).ok());
          } else {
            context->TryCancel();
          }
        });
    EXPECT_EQ(seen.size(), 4u);
    for (const Generation& answer : answers) {
      if (abort) {
        EXPECT_TRUE(answer.status.ok()) << answer.status;
        EXPECT_EQ(answer.finished.reason(), v1::FINISH_REASON_CANCELLED);
      } else {
        EXPECT_TRUE(absl::IsCancelled(answer.status)) << answer.status;
      }
    }
    EXPECT_TRUE(client().AwaitIdle(Patience(absl::Seconds(5))));
  }
}

TEST_F(Api, SaysWhatOnlyLaterVersionsDo) {
  v1::ForkSessionRequest fork;
  fork.set_session_id("a");
  fork.set_new_session_id("b");
  v1::ForkSessionResponse forked;
  EXPECT_EQ(api().ForkSession(TestClient::Context().get(), fork, &forked).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  v1::ProfileResponse profile;
  EXPECT_EQ(client()
                .admin()
                .Profile(TestClient::Context().get(), v1::ProfileRequest(), &profile)
                .error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(Api, ReflectsOnlyIfAskedTo) {
  const auto reflects = [](const std::string& address) {
    std::string response;
    return TestClient(address, address)
        .Call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "", &response)
        .error_code();
  };
  for (const std::string& address : {cluster_->api_address(), cluster_->admin_address(),
                                     cluster_->worker_address(), cluster_->kvstore_address()}) {
    EXPECT_EQ(reflects(address), grpc::StatusCode::UNIMPLEMENTED) << address;
  }
  ClusterOptions options;
  options.coordinator_args = {"--reflection"};
  Cluster asked(options);
  ASSERT_NO_FATAL_FAILURE(asked.AwaitServing());
  EXPECT_EQ(reflects(asked.api_address()), grpc::StatusCode::OK);
  EXPECT_EQ(reflects(asked.admin_address()), grpc::StatusCode::OK);
  EXPECT_EQ(reflects(asked.worker_address()), grpc::StatusCode::UNIMPLEMENTED);
  // What a client needs that knows no service beforehand: ServerReflectionRequest{
  // file_containing_symbol = 4}.
  for (const std::string symbol : {"headroom.v1.InferenceService", "grpc.health.v1.Health"}) {
    std::string file;
    EXPECT_TRUE(asked.client()
                    .Call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                          absl::StrCat("\x22", std::string(1, static_cast<char>(symbol.size())), symbol),
                          &file)
                    .ok());
    EXPECT_TRUE(absl::StrContains(file, symbol == "grpc.health.v1.Health" ? "HealthCheckRequest"
                                                                          : "GenerateRequest"))
        << symbol;
  }
}

// ---------------------------------------------------------------- what it refuses

TEST_F(Api, NamesTheFieldThatIsWrong) {
  const auto complaint = [](auto&& change) {
    v1::GenerateRequest request = Ask({10, 11, 12}, 2);
    change(request);
    return Complaint(request);
  };
  using R = v1::GenerateRequest;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(complaint([](R& r) { r.mutable_token_ids()->set_ids(1, kTestVocab); }),
            "token_ids.ids[1]");
  EXPECT_EQ(complaint([](R& r) { r.mutable_token_ids()->set_ids(2, -1); }), "token_ids.ids[2]");
  EXPECT_EQ(complaint([](R& r) { r.mutable_token_ids()->clear_ids(); }), "token_ids.ids");
  EXPECT_EQ(complaint([](R& r) { r.clear_input(); }), "input");
  EXPECT_EQ(complaint([](R& r) { r.set_prompt(""); }), "prompt");
  EXPECT_EQ(complaint([](R& r) {
              r.mutable_token_ids()->mutable_ids()->Resize(kTestContext, 9);
            }),
            "token_ids.ids");
  EXPECT_EQ(complaint([&](R& r) { r.mutable_sampling()->set_temperature(nan); }),
            "sampling.temperature");
  EXPECT_EQ(complaint([](R& r) { r.mutable_sampling()->set_temperature(-1); }),
            "sampling.temperature");
  EXPECT_EQ(complaint([&](R& r) { r.mutable_sampling()->set_top_p(nan); }), "sampling.top_p");
  EXPECT_EQ(complaint([](R& r) { r.mutable_sampling()->set_top_k(-5); }), "sampling.top_k");
  EXPECT_EQ(complaint([&](R& r) { r.mutable_sampling()->set_presence_penalty(nan); }),
            "sampling.presence_penalty");
  EXPECT_EQ(complaint([](R& r) { (*r.mutable_sampling()->mutable_logit_bias())[kTestVocab] = 1; }),
            absl::StrCat("sampling.logit_bias[", kTestVocab, "]"));
  EXPECT_EQ(complaint([](R& r) {
              for (int i = 0; i < 17; ++i) r.mutable_stopping()->add_stop_strings("x");
            }),
            "stopping.stop_strings");
  EXPECT_EQ(complaint([](R& r) { r.mutable_stopping()->add_stop_strings(""); }),
            "stopping.stop_strings[0]");
  EXPECT_EQ(complaint([](R& r) { r.mutable_stopping()->set_max_tokens(-1); }),
            "stopping.max_tokens");
  EXPECT_EQ(complaint([](R& r) { r.mutable_logprobs()->set_num_top(21); }), "logprobs.num_top");
  EXPECT_EQ(complaint([](R& r) { r.set_session_id("not/valid"); }), "session_id");
  EXPECT_EQ(complaint([](R& r) { Place(r, {{v1::LANE_RESIDENT, 0.5}}); }), "placement.shares");
  EXPECT_EQ(complaint([](R& r) { r.mutable_placement()->set_chunk_tokens(0); }),
            "placement.chunk_tokens");
  EXPECT_EQ(complaint([](R& r) { r.set_n(0); }), "n");
  EXPECT_EQ(complaint([](R& r) { r.set_n(17); }), "n");
}

TEST_F(Api, ServesThePromptThatJustFits) {
  ClusterOptions options;
  options.coordinator_args = {"--context-limit", "1024"};
  Cluster small(options);
  ASSERT_NO_FATAL_FAILURE(small.AwaitServing());
  const Generation generation = small.client().Generate(Ask(RandomPrompt(6, 1023), 50));
  EXPECT_TRUE(generation.status.ok()) << generation.status;
  EXPECT_EQ(generation.tokens.size(), 1u);
  EXPECT_EQ(generation.finished.reason(), v1::FINISH_REASON_LENGTH);
  const absl::Status longer = small.client().Generate(Ask(RandomPrompt(6, 1024), 50)).status;
  EXPECT_TRUE(absl::IsInvalidArgument(longer)) << longer;
}

TEST_F(Api, RefusesWhatNeverFitsWithTheNumbers) {
  v1::GenerateRequest request = Ask(RandomPrompt(7, 8000), 10);
  Place(request, AllResident());  // 31 MiB of keys and values
  const absl::Status status = client().Generate(request).status;
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(ReasonOf(status), "DOES_NOT_FIT");
}

}  // namespace
}  // namespace headroom
