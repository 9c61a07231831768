#include "tests/system/test_env.h"

#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/grpc_status.h"

namespace headroom {
namespace {

// On a GPU host the same tests run on the GPU.
std::string TestDevice() {
  const char* const device = getenv("HEADROOM_TEST_DEVICE");
  return device != nullptr ? device : "cpu";
}

constexpr int32_t kFirstPlainId = 3;  // below are the tokenizer's specials

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           const TestSecurity& security) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  if (!security.server_name.empty()) args.SetSslTargetNameOverride(security.server_name);
  return grpc::CreateCustomChannel(address,
                                   security.credentials != nullptr
                                       ? security.credentials
                                       : grpc::InsecureChannelCredentials(),
                                   args);
}

std::string DifferenceOfRecords(const v1::TokenRecord& a, const v1::TokenRecord& b) {
  const auto bits = [](float value) { return std::bit_cast<uint32_t>(value); };
  if (a.token_id() != b.token_id()) return absl::StrCat("ids ", a.token_id(), ", ", b.token_id());
  if (a.has_logprob() != b.has_logprob() || bits(a.logprob()) != bits(b.logprob())) {
    return absl::StrCat("log-probabilities ", a.logprob(), ", ", b.logprob());
  }
  if (a.top_size() != b.top_size()) return "numbers of likeliest tokens";
  for (int i = 0; i < a.top_size(); ++i) {
    if (a.top(i).token_id() != b.top(i).token_id() ||
        bits(a.top(i).logprob()) != bits(b.top(i).logprob())) {
      return absl::StrCat("likeliest tokens number ", i);
    }
  }
  return "";
}

template <typename Records>
std::string DifferenceOf(const std::string& what, const Records& a, const Records& b) {
  if (a.size() != b.size()) return absl::StrCat(what, ": ", a.size(), " and ", b.size());
  for (size_t i = 0; i < static_cast<size_t>(a.size()); ++i) {
    const std::string difference = DifferenceOfRecords(a[i], b[i]);
    if (!difference.empty()) return absl::StrCat(what, " ", i, ": ", difference);
  }
  return "";
}

}  // namespace

RandomModelSpec SystemTestModel() {
  RandomModelSpec spec;
  spec.with_tokenizer = true;
  spec.never_ends = true;
  return spec;
}

void MustWriteModel(const RandomModelSpec& spec, const std::string& dir) {
  const absl::Status written = WriteRandomModel(spec, dir);
  if (written.ok()) return;
  std::fprintf(stderr, "%s\n", written.ToString().c_str());
  abort();
}

// ---------------------------------------------------------------- requests and answers

std::vector<int32_t> RandomPrompt(uint64_t seed, int64_t count) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(kFirstPlainId + static_cast<int32_t>(random() % (kTestVocab - kFirstPlainId)));
  }
  return ids;
}

v1::GenerateRequest Ask(const std::vector<int32_t>& prompt, int32_t max_tokens) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_max_tokens(max_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_logprobs()->set_num_top(2);
  request.mutable_logprobs()->set_prompt(true);
  return request;
}

void Place(v1::GenerateRequest& request, const Shares& shares) {
  v1::PlacementOptions& placement = *request.mutable_placement();
  placement.set_mode(v1::PlacementOptions::MODE_SHARES);
  placement.clear_shares();
  for (const auto& [lane, share] : shares) {
    v1::LaneShare* const added = placement.add_shares();
    added->set_lane(lane);
    added->set_share(share);
  }
  placement.set_deterministic(true);
  request.set_explain(true);
}

v1::GenerateRequest AskIn(const std::string& session, const std::vector<int32_t>& prompt,
                          int32_t max_tokens, const Shares& shares) {
  v1::GenerateRequest request = Ask(prompt, max_tokens);
  request.mutable_logprobs()->set_prompt(false);
  Place(request, shares);
  if (!session.empty()) request.set_session_id(session);
  return request;
}

std::vector<int32_t> Generation::ids() const {
  std::vector<int32_t> ids;
  for (const v1::TokenRecord& token : tokens) ids.push_back(token.token_id());
  return ids;
}

int64_t Generation::LaneBytes(v1::Lane lane) const {
  int64_t bytes = 0;
  const v1::Explanation& explanation = finished.explanation();
  for (const auto* lanes : {&explanation.prefill_lanes(), &explanation.decode_lanes()}) {
    for (const v1::LaneUse& use : *lanes) {
      if (use.lane() == lane) bytes += use.bytes();
    }
  }
  return bytes;
}

double Generation::KvHeads(v1::Lane lane) const {
  for (const v1::LaneUse& use : finished.explanation().decode_lanes()) {
    if (use.lane() == lane) return use.kv_heads();
  }
  return 0;
}

std::string Difference(const Generation& a, const Generation& b) {
  if (!a.status.ok() || !b.status.ok()) {
    return absl::StrCat("calls: ", a.status.ToString(), ", ", b.status.ToString());
  }
  const std::string prompt = DifferenceOf("prompt token", a.finished.prompt_logprobs(),
                                          b.finished.prompt_logprobs());
  return prompt.empty() ? DifferenceOf("token", a.tokens, b.tokens) : prompt;
}

// ---------------------------------------------------------------- the client

TestClient::TestClient(const std::string& api_address, const std::string& admin_address,
                       const TestSecurity& security)
    : channel_(MakeChannel(api_address, security)),
      api_(v1::InferenceService::NewStub(channel_)),
      admin_(v1::AdminService::NewStub(MakeChannel(admin_address, security))) {}

std::unique_ptr<grpc::ClientContext> TestClient::Context(absl::Duration most) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(absl::ToChronoTime(absl::Now() + Patience(most)));
  return context;
}

Generation TestClient::Generate(const v1::GenerateRequest& request,
                                const std::function<void(int tokens)>& on_token) const {
  Generation generation;
  const auto context = Context(absl::Seconds(60));
  const auto stream = api_->Generate(context.get(), request);
  for (v1::GenerateResponse event; stream->Read(&event);) {
    if (event.has_accepted()) {
      ++generation.accepted_events;
      generation.accepted = event.accepted();
    } else if (event.has_delta()) {
      generation.text += event.delta().text();
      for (const v1::TokenRecord& token : event.delta().tokens()) {
        generation.tokens.push_back(token);
        if (on_token != nullptr) on_token(static_cast<int>(generation.tokens.size()));
      }
    } else {
      generation.finished = event.finished();
    }
  }
  generation.status = FromGrpcStatus(stream->Finish());
  return generation;
}

Generation TestClient::GenerateOnce(const v1::GenerateRequest& request) const {
  Generation generation;
  v1::GenerateOnceRequest once;
  *once.mutable_request() = request;
  v1::GenerateOnceResponse response;
  const auto context = Context(absl::Seconds(60));
  generation.status = FromGrpcStatus(api_->GenerateOnce(context.get(), once, &response));
  generation.accepted.set_request_id(response.request_id());
  *generation.accepted.mutable_prompt_token_ids() = response.prompt_token_ids();
  generation.text = response.text();
  generation.tokens.assign(response.tokens().begin(), response.tokens().end());
  generation.finished = response.finished();
  return generation;
}

std::vector<Generation> TestClient::GenerateAll(
    const std::vector<v1::GenerateRequest>& requests) const {
  std::vector<Generation> answers(requests.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < requests.size(); ++i) {
    threads.emplace_back([&, i] { answers[i] = Generate(requests[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  return answers;
}

v1::GetLoadResponse TestClient::Load() const {
  v1::GetLoadResponse response;
  const grpc::Status status =
      api_->GetLoad(Context().get(), v1::GetLoadRequest(), &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

v1::GetStatusResponse TestClient::Status() const {
  v1::GetStatusResponse response;
  const grpc::Status status =
      admin_->GetStatus(Context().get(), v1::GetStatusRequest(), &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

grpc::Status TestClient::Call(const std::string& method, const std::string& request,
                              std::string* response) const {
  grpc::GenericStub stub(channel_);
  const grpc::Slice slice(request);
  const grpc::ByteBuffer sent(&slice, 1);
  const auto context = Context(absl::Seconds(2));
  context->set_wait_for_ready(true);  // a call that fails at once moves no connection forward
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(context.get(), method, sent, &queue);
  call->StartCall();
  grpc::ByteBuffer received;
  grpc::Status status;
  call->Finish(&received, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  std::vector<grpc::Slice> slices;  // in as many pieces as it was read in
  response->clear();
  if (!status.ok() || !received.Dump(&slices).ok()) return status;
  for (const grpc::Slice& piece : slices) {
    response->append(reinterpret_cast<const char*>(piece.begin()), piece.size());
  }
  return status;
}

// grpc.health.v1.Health, whose messages are a string and an enum.
std::string TestClient::Health(const std::string& service) const {
  std::string request, response;
  if (!service.empty()) {
    request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  }
  const grpc::Status status = Call("/grpc.health.v1.Health/Check", request, &response);
  if (!status.ok()) return status.error_message();
  if (response.size() < 2) return "UNKNOWN";
  return response[1] == 1 ? "SERVING" : "NOT_SERVING";
}

bool TestClient::AwaitHealth(const std::string& wanted, absl::Duration most) const {
  return WaitUntil(Patience(most), [&] { return Health() == wanted; });
}

bool TestClient::AwaitIdle(absl::Duration most) const {
  return WaitUntil(Patience(most), [&] {
    const v1::GetLoadResponse load = Load();
    return load.running_requests() == 0 && load.waiting_requests() == 0;
  });
}

// ---------------------------------------------------------------- the processes

Cluster::Cluster(const ClusterOptions& options) : options_(options) {
  if (options_.model_dir.empty()) {
    options_.model_dir = dir_.File("model");
    MustWriteModel(SystemTestModel(), options_.model_dir);
  }
  client_ = std::make_unique<TestClient>(api_address(), admin_address(), options_.security);
  StartKvStore();
  StartWorker();
  StartCoordinator();
}

std::unique_ptr<Process> Cluster::Start(const std::string& subcommand,
                                        std::vector<std::string> args,
                                        const std::vector<std::string>& more) {
  args.insert(args.begin(), {HeadroomBinary(), subcommand});
  args.insert(args.end(), more.begin(), more.end());
  return std::make_unique<Process>(std::move(args), dir_.File(subcommand + ".log"));
}

void Cluster::StartKvStore() {
  kvstore_.reset();
  kvstore_ = Start("kvstore",
                   {"--listen", Address("kvstore"), "--segment-dir", segment_dir(),
                    "--host-memory", options_.host_memory},
                   options_.kvstore_args);
}

void Cluster::StartWorker() {
  worker_.reset();
  worker_ = Start("worker",
                  {"--listen", Address("worker"), "--model", options_.model_dir, "--device",
                   TestDevice(), "--gpu-memory", options_.gpu_memory},
                  options_.worker_args);
}

void Cluster::StartCoordinator() {
  coordinator_.reset();
  coordinator_ = Start("coordinator",
                       {"--listen", api_address(), "--admin", admin_address(), "--worker",
                        Address("worker"), "--kvstore", Address("kvstore"), "--model",
                        options_.model_dir},
                       options_.coordinator_args);
}

void Cluster::AwaitServing() {
  bool ended = false;
  const bool serving = WaitUntil(Patience(absl::Seconds(20)), [&] {
    ended = !kvstore_->running() || !worker_->running() || !coordinator_->running();
    return ended || client_->Health() == "SERVING";
  });
  ASSERT_TRUE(serving && !ended) << "health: " << client_->Health();
}

}  // namespace headroom
