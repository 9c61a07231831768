#include "services/coordinator/inference_service.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/status.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/generate_service.h"
#include "services/coordinator/plan_proto.h"
#include "services/coordinator/unary_service.h"

namespace headroom::coordinator {
namespace {

constexpr int32_t kMaxPage = 1000;
constexpr int32_t kDefaultPage = 100;
// gRPC's 'no deadline' is the end of its clock's range; whatever is beyond a year is none.
constexpr absl::Duration kNoDeadline = absl::Hours(24 * 365);

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

std::string MetadataOf(const grpc::CallbackServerContext& context, const char* name) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(name);
  return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
}

std::string DrawRequestId() {
  std::random_device device;
  return absl::StrFormat("%08x%08x%08x%08x", device(), device(), device(), device());
}

// A failed call that no GenerateStream was made for.
class RefusedStream : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  explicit RefusedStream(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

}  // namespace

InferenceService::InferenceService(Scheduler* scheduler, const ServedModel* model,
                                   int64_t context_limit)
    : scheduler_(scheduler), model_(model), context_limit_(context_limit) {
  // In the order of inference.proto.
  const MostBytes most_bytes = [this] {
    const absl::StatusOr<RequestLimits> limits = Limits();
    return limits.ok() ? MostRequestBytes(*model_, *limits) : std::numeric_limits<int64_t>::max();
  };
  MarkMethodCallback(0, new CheckedServerStreamingHandler<v1::GenerateRequest, v1::GenerateResponse>(
                            &unparsable_, most_bytes,
                            [](grpc::CallbackServerContext* context, const absl::Status& status) {
                              AddErrorMetadata(context, MetadataOf(*context, "x-request-id"), status);
                              return new RefusedStream(status);
                            },
                            [this](grpc::CallbackServerContext* context,
                                   const v1::GenerateRequest* request) {
                              return Generate(context, request);
                            }));
  CheckMessages(1, &InferenceService::GenerateOnce, "request.", most_bytes);
  CheckMessages(2, &InferenceService::Tokenize);
  CheckMessages(3, &InferenceService::Detokenize);
  CheckMessages(4, &InferenceService::GetModelInfo);
  CheckMessages(5, &InferenceService::GetServerInfo);
  CheckMessages(6, &InferenceService::GetLoad);
  CheckMessages(7, &InferenceService::Abort);
  CheckMessages(8, &InferenceService::GetSession);
  CheckMessages(9, &InferenceService::ListSessions);
  CheckMessages(10, &InferenceService::UpdateSession);
  CheckMessages(11, &InferenceService::DeleteSession);
  CheckMessages(12, &InferenceService::ForkSession);
}

template <typename Request, typename Response>
void InferenceService::CheckMessages(int index,
                                     grpc::ServerUnaryReactor* (InferenceService::*method)(
                                         grpc::CallbackServerContext*, const Request*, Response*),
                                     const char* omitted, MostBytes most_bytes) {
  const auto refuse = [](grpc::CallbackServerContext* context, const absl::Status& status) {
    AddErrorMetadata(context, MetadataOf(*context, "x-request-id"), status);
    return Answer(context, status);
  };
  MarkMethodCallback(index, new CheckedUnaryHandler<Request, Response>(
                                &unparsable_, omitted, std::move(most_bytes), refuse,
                                [this, method](grpc::CallbackServerContext* context,
                                               const Request* request, Response* response) {
                                  return (this->*method)(context, request, response);
                                }));
}

absl::StatusOr<RequestLimits> InferenceService::Limits() const {
  const std::shared_ptr<const PeerFacts> facts = scheduler_->facts();
  if (facts == nullptr) return NotReadyError("worker and kvstore have not been found yet");
  RequestLimits limits;
  limits.vocab_size = facts->worker.vocab_size();
  limits.max_context_tokens = facts->worker.max_position_tokens();
  if (context_limit_ > 0) {
    limits.max_context_tokens = std::min(limits.max_context_tokens, context_limit_);
  }
  limits.max_chunk_tokens = facts->worker.max_chunk_tokens();
  return limits;
}

absl::StatusOr<std::unique_ptr<Request>> InferenceService::ReserveRequest(
    const grpc::CallbackServerContext& context, const v1::GenerateRequest& proto) const {
  const absl::Time arrival = absl::Now();
  std::string id = MetadataOf(context, "x-request-id");
  if (id.empty()) {
    id = DrawRequestId();
  } else {
    HEADROOM_RETURN_IF_ERROR(CheckRequestId(id));
  }
  const std::string correlation_id = MetadataOf(context, "x-correlation-id");
  if (!correlation_id.empty()) {
    LogInfo(absl::StrCat("x-correlation-id ", correlation_id.substr(0, kMaxRequestIdBytes)), id);
  }
  HEADROOM_ASSIGN_OR_RETURN(const RequestLimits limits, Limits());
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Request> request,
                            ValidateRequest(proto, *model_, limits));
  request->id = std::move(id);
  request->arrival = arrival;
  const auto left = context.deadline() - std::chrono::system_clock::now();
  if (absl::FromChrono(left) < kNoDeadline)
    request->deadline = absl::FromChrono(context.deadline());
  HEADROOM_RETURN_IF_ERROR(scheduler_->Reserve(request->id, request->n));
  return request;
}

// ---------------------------------------------------------------- generation

template <typename Call>
Call* InferenceService::Begin(grpc::CallbackServerContext* context, const v1::GenerateRequest& proto,
                              std::unique_ptr<Request> request, std::shared_ptr<Call> call) {
  // A task must be copyable.
  const auto begin = [this, context, &proto, request = std::shared_ptr<Request>(std::move(request)), call] {
    const absl::StatusOr<RequestLimits> limits = Limits();
    absl::Status status = limits.status();
    if (status.ok() && context->IsCancelled()) status = ClientGoneError();
    if (status.ok() && !scheduler_->IsEnding(request->id)) {
      status = TakePrompt(proto, *model_, *limits, *request);
    }
    if (status.ok()) {
      call->Submit(*model_, *request);
    } else {
      call->Refuse(status);
    }
  };
  const absl::Status taken = tokenizers_.Run(TextBytes(proto), begin);
  if (!taken.ok()) call->Refuse(taken);
  return call.get();
}

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  absl::StatusOr<std::unique_ptr<Request>> reserved = ReserveRequest(*context, *request);
  if (!reserved.ok()) {
    AddErrorMetadata(context, MetadataOf(*context, "x-request-id"), reserved.status());
    return new RefusedStream(reserved.status());
  }
  const auto call = GenerateStream::Make(context, scheduler_, **reserved);
  return Begin(context, *request, *std::move(reserved), call);
}

grpc::ServerUnaryReactor* InferenceService::GenerateOnce(grpc::CallbackServerContext* context,
                                                         const v1::GenerateOnceRequest* request,
                                                         v1::GenerateOnceResponse* response) {
  absl::StatusOr<std::unique_ptr<Request>> reserved = ReserveRequest(*context, request->request());
  if (!reserved.ok()) {
    AddErrorMetadata(context, MetadataOf(*context, "x-request-id"), reserved.status());
    return Answer(context, reserved.status());
  }
  const auto call = GenerateOnceCall::Make(context, scheduler_, **reserved, response);
  return Begin(context, request->request(), *std::move(reserved), call);
}

grpc::ServerUnaryReactor* InferenceService::Abort(grpc::CallbackServerContext* context,
                                                  const v1::AbortRequest* request,
                                                  v1::AbortResponse*) {
  if (request->request_id().empty()) {
    return Answer(context, BadRequestError({{"request_id", "is empty"}}));
  }
  scheduler_->Abort(request->request_id());
  return Answer(context, absl::OkStatus());
}

// ---------------------------------------------------------------- text

template <typename Answerer>
grpc::ServerUnaryReactor* InferenceService::AnswerFromPool(grpc::CallbackServerContext* context,
                                                           int64_t text_bytes, Answerer answer) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const absl::Status taken = tokenizers_.Run(text_bytes, [context, reactor, answer = std::move(answer)] {
    reactor->Finish(ToGrpcStatus(context->IsCancelled() ? ClientGoneError() : answer()));
  });
  if (taken.ok()) return reactor;
  AddErrorMetadata(context, "", taken);
  reactor->Finish(ToGrpcStatus(taken));
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  const int64_t text_bytes = static_cast<int64_t>(request->text().size()) + TextBytes(request->chat());
  return AnswerFromPool(context, text_bytes, [this, request, response]() -> absl::Status {
    // Before the worker has been found, only messages have a limit.
    const absl::StatusOr<RequestLimits> found = Limits();
    const RequestLimits* const limits = found.ok() ? &*found : nullptr;
    const absl::StatusOr<std::vector<int32_t>> ids =
        request->has_chat()   ? EncodeChat(*model_, request->chat(), "chat", limits)
        : request->has_text() ? EncodeText(*model_, request->text(), "text", limits)
                              : BadRequestError({{"input", "is not set: expected text or chat"}});
    if (ids.ok()) response->mutable_token_ids()->Add(ids->begin(), ids->end());
    return ids.status();
  });
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  if (model_->tokenizer() == nullptr) {
    return Answer(context, WithReason(absl::FailedPreconditionError("the model has no tokenizer"),
                                      "NO_TOKENIZER"));
  }
  const auto bytes = static_cast<int64_t>(request->token_ids_size() * sizeof(int32_t));
  return AnswerFromPool(context, bytes, [this, request, response]() -> absl::Status {
    const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
    absl::StatusOr<std::string> text = model_->tokenizer()->Decode(ids);
    if (absl::IsInvalidArgument(text.status())) {
      return BadRequestError({{"token_ids", std::string(text.status().message())}});
    }
    if (text.ok()) response->set_text(*std::move(text));
    return text.status();
  });
}

// ---------------------------------------------------------------- about the server

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetModelInfoRequest*,
                                                         v1::GetModelInfoResponse* response) {
  const absl::StatusOr<RequestLimits> limits = Limits();
  if (!limits.ok()) return Answer(context, limits.status());
  const v1::GetWorkerInfoResponse& worker = scheduler_->facts()->worker;
  response->set_model(model_->name());
  response->set_architecture(model_->architecture());
  *response->mutable_geometry() = worker.geometry();
  response->set_num_q_heads(worker.num_q_heads());
  response->set_vocab_size(worker.vocab_size());
  response->set_max_context_tokens(limits->max_context_tokens);
  *response->mutable_default_sampling() = model_->default_sampling();
  response->mutable_eos_token_ids()->Add(model_->eos_ids().begin(), model_->eos_ids().end());
  response->set_has_chat_template(model_->chat_template() != nullptr);
  response->set_max_top_logprobs(kMaxTopLogprobs);
  response->set_max_n(kMaxAnswers);
  response->set_kv_bytes_per_token(FromProto(worker.geometry()).BytesPerToken());
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::GetServerInfo(grpc::CallbackServerContext* context,
                                                          const v1::GetServerInfoRequest*,
                                                          v1::GetServerInfoResponse* response) {
  response->set_version(kVersion);
  response->set_schema_revision(kApiRevision);
  response->set_minimum_client_revision(kApiRevision);
  if (const std::shared_ptr<const PeerFacts> facts = scheduler_->facts()) {
    response->set_device(facts->worker.device());
    response->set_device_budget_bytes(facts->worker.memory().budget_bytes());
    response->set_host_capacity_bytes(facts->store.capacity_bytes());
    response->set_store_generation(facts->store.generation());
    response->set_worker_incarnation(facts->worker.incarnation());
  }
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::GetLoad(grpc::CallbackServerContext* context,
                                                    const v1::GetLoadRequest*,
                                                    v1::GetLoadResponse* response) {
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->GetStatus([=](v1::GetStatusResponse status) {
      response->set_running_requests(status.running_requests());
      response->set_waiting_requests(status.waiting_requests());
      response->set_host_used_bytes(status.host_used_bytes());
      response->set_host_capacity_bytes(status.host_capacity_bytes());
      response->set_device_used_bytes(status.device_memory().high_water_bytes());
      response->set_device_budget_bytes(status.device_memory().budget_bytes());
      response->set_sessions(status.sessions());
      reactor->Finish(grpc::Status::OK);
    });
  });
}

// ---------------------------------------------------------------- sessions

grpc::ServerUnaryReactor* InferenceService::GetSession(grpc::CallbackServerContext* context,
                                                       const v1::GetSessionRequest* request,
                                                       v1::GetSessionResponse* response) {
  const absl::Status valid = CheckSessionId(request->session_id());
  if (!valid.ok()) return Answer(context, valid);
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->GetSession(request->session_id(), [=](absl::StatusOr<v1::Session> session) {
      if (session.ok()) *response->mutable_session() = *std::move(session);
      reactor->Finish(ToGrpcStatus(session.status()));
    });
  });
}

grpc::ServerUnaryReactor* InferenceService::ListSessions(grpc::CallbackServerContext* context,
                                                         const v1::ListSessionsRequest* request,
                                                         v1::ListSessionsResponse* response) {
  const int32_t page_size = request->has_page_size() ? request->page_size() : kDefaultPage;
  if (page_size < 1 || page_size > kMaxPage) {
    return Answer(
        context, BadRequestError({{"page_size",
                                   absl::StrCat("is ", page_size, ", expected 1 to ", kMaxPage)}}));
  }
  // The token is the last session's id.
  if (!request->page_token().empty() && !SessionTable::IsValidId(request->page_token())) {
    return Answer(context, BadRequestError({{"page_token", "is none that this server gave"}}));
  }
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->ListSessions(request->page_token(), static_cast<size_t>(page_size),
                                    [=](std::vector<v1::Session> sessions) {
                                      if (static_cast<int32_t>(sessions.size()) == page_size) {
                                        response->set_next_page_token(sessions.back().session_id());
                                      }
                                      for (v1::Session& session : sessions)
                                        *response->add_sessions() = std::move(session);
                                      reactor->Finish(grpc::Status::OK);
                                    });
  });
}

grpc::ServerUnaryReactor* InferenceService::UpdateSession(grpc::CallbackServerContext* context,
                                                          const v1::UpdateSessionRequest* request,
                                                          v1::UpdateSessionResponse* response) {
  absl::Status valid = CheckSessionId(request->session_id());
  if (valid.ok() && request->has_ttl_ms() && request->ttl_ms() < 1) {
    valid = BadRequestError(
        {{"ttl_ms", absl::StrCat("is ", request->ttl_ms(), ", expected at least 1")}});
  }
  if (!valid.ok()) return Answer(context, valid);
  std::optional<int64_t> ttl_ms;
  std::optional<bool> pinned;
  if (request->has_ttl_ms()) ttl_ms = request->ttl_ms();
  if (request->has_pinned()) pinned = request->pinned();
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->UpdateSession(request->session_id(), ttl_ms, pinned,
                                     [=](absl::StatusOr<v1::Session> session) {
                                       if (session.ok()) {
                                         *response->mutable_session() = *std::move(session);
                                       }
                                       reactor->Finish(ToGrpcStatus(session.status()));
                                     });
  });
}

grpc::ServerUnaryReactor* InferenceService::DeleteSession(grpc::CallbackServerContext* context,
                                                          const v1::DeleteSessionRequest* request,
                                                          v1::DeleteSessionResponse*) {
  const absl::Status valid = CheckSessionId(request->session_id());
  if (!valid.ok()) return Answer(context, valid);
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->DeleteSession(request->session_id(), [=](const absl::Status& status) {
      reactor->Finish(ToGrpcStatus(status));
    });
  });
}

grpc::ServerUnaryReactor* InferenceService::ForkSession(grpc::CallbackServerContext* context,
                                                        const v1::ForkSessionRequest*,
                                                        v1::ForkSessionResponse*) {
  return Answer(context,
                WithReason(absl::UnimplementedError("sessions of this version share no extents"),
                           "FORK_UNSUPPORTED"));
}

}  // namespace headroom::coordinator
