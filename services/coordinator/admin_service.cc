#include "services/coordinator/admin_service.h"

#include <utility>

#include "common/errors.h"
#include "common/grpc_status.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/inference_service.h"
#include "services/coordinator/unary_service.h"

namespace headroom::coordinator {

grpc::ServerUnaryReactor* AdminService::GetStatus(grpc::CallbackServerContext* context,
                                                  const v1::GetStatusRequest*,
                                                  v1::GetStatusResponse* response) {
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->GetStatus([this, reactor, response](v1::GetStatusResponse status) {
      *response = std::move(status);
      response->set_version(kVersion);
      response->set_model(model_->name());
      for (v1::ProcessStatus& process : *response->mutable_processes()) {
        process.set_address(process.name() == "worker"    ? addresses_.worker
                            : process.name() == "kvstore" ? addresses_.kvstore
                                                          : addresses_.coordinator);
      }
      reactor->Finish(grpc::Status::OK);
    });
  });
}

grpc::ServerUnaryReactor* AdminService::Drain(grpc::CallbackServerContext* context,
                                              const v1::DrainRequest*, v1::DrainResponse*) {
  on_drain_();
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->Drain([reactor] { reactor->Finish(grpc::Status::OK); });
  });
}

grpc::ServerUnaryReactor* AdminService::Flush(grpc::CallbackServerContext* context,
                                              const v1::FlushRequest*,
                                              v1::FlushResponse* response) {
  return AnswerLater(context, [&](grpc::ServerUnaryReactor* reactor) {
    return scheduler_->Flush([reactor, response](int32_t dropped) {
      response->set_dropped_sessions(dropped);
      reactor->Finish(grpc::Status::OK);
    });
  });
}

grpc::ServerUnaryReactor* AdminService::Profile(grpc::CallbackServerContext* context,
                                                const v1::ProfileRequest*, v1::ProfileResponse*) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(WithReason(
      absl::UnimplementedError("this version records no traces"), "PROFILE_UNSUPPORTED")));
  return reactor;
}

}  // namespace headroom::coordinator
