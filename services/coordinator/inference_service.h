// The public API: messages in, messages out. What happens in between is the scheduler's.
#ifndef HEADROOM_SERVICES_COORDINATOR_INFERENCE_SERVICE_H_
#define HEADROOM_SERVICES_COORDINATOR_INFERENCE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "headroom/v1/inference.grpc.pb.h"
#include "services/coordinator/request_validation.h"
#include "services/coordinator/scheduler.h"
#include "services/coordinator/served_model.h"
#include "services/coordinator/tokenizer_pool.h"
#include "services/coordinator/unparsable_service.h"

namespace headroom::coordinator {

inline constexpr char kVersion[] = "0.1.0";
inline constexpr int32_t kApiRevision = 1;

// Thread-safe; handlers do not block: what takes long with a text is a pool's.
class InferenceService final : public v1::InferenceService::CallbackService {
 public:
  // `scheduler` and `model` outlive the server. `context_limit`: most tokens of a sequence, beside
  // the model's own limit; 0: only that.
  InferenceService(Scheduler* scheduler, const ServedModel* model, int64_t context_limit);

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* GenerateOnce(grpc::CallbackServerContext* context,
                                         const v1::GenerateOnceRequest* request,
                                         v1::GenerateOnceResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest* request,
                                         v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context,
                                  const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* GetSession(grpc::CallbackServerContext* context,
                                       const v1::GetSessionRequest* request,
                                       v1::GetSessionResponse* response) override;
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context,
                                         const v1::ListSessionsRequest* request,
                                         v1::ListSessionsResponse* response) override;
  grpc::ServerUnaryReactor* UpdateSession(grpc::CallbackServerContext* context,
                                          const v1::UpdateSessionRequest* request,
                                          v1::UpdateSessionResponse* response) override;
  grpc::ServerUnaryReactor* DeleteSession(grpc::CallbackServerContext* context,
                                          const v1::DeleteSessionRequest* request,
                                          v1::DeleteSessionResponse* response) override;
  grpc::ServerUnaryReactor* ForkSession(grpc::CallbackServerContext* context,
                                        const v1::ForkSessionRequest* request,
                                        v1::ForkSessionResponse* response) override;

 private:
  // Puts a handler around method number `index` that says what is wrong with a message.
  template <typename Request, typename Response>
  void CheckMessages(int index,
                     grpc::ServerUnaryReactor* (InferenceService::*method)(
                         grpc::CallbackServerContext*, const Request*, Response*),
                     const char* omitted = "", MostBytes most_bytes = nullptr);
  // The checked request with its id, arrival and deadline, but without its prompt; has its places with the scheduler.
  absl::StatusOr<std::unique_ptr<Request>> ReserveRequest(const grpc::CallbackServerContext& context,
                                                          const v1::GenerateRequest& proto) const;
  // Has the prompt tokenized and the request submitted, or refused. `proto` lives until then.
  template <typename Call>
  Call* Begin(grpc::CallbackServerContext* context, const v1::GenerateRequest& proto,
              std::unique_ptr<Request> request, std::shared_ptr<Call> call);
  // Ends the call with what `answer` returns, which the pool's threads run.
  template <typename Answerer>
  grpc::ServerUnaryReactor* AnswerFromPool(grpc::CallbackServerContext* context, int64_t text_bytes,
                                           Answerer answer);
  // UNAVAILABLE before worker and store were found.
  absl::StatusOr<RequestLimits> Limits() const;

  Scheduler* const scheduler_;
  const ServedModel* const model_;
  const int64_t context_limit_;
  UnparsableRequests unparsable_;
  TokenizerPool tokenizers_{TokenizerPool::DefaultThreads()};
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_INFERENCE_SERVICE_H_
