#ifndef HEADROOM_SERVICES_COORDINATOR_UNARY_SERVICE_H_
#define HEADROOM_SERVICES_COORDINATOR_UNARY_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include "common/grpc_status.h"
#include "services/coordinator/errors.h"

namespace headroom::coordinator {

// For calls that the scheduler's thread answers: `post` is what hands the question over.
template <typename Post>
grpc::ServerUnaryReactor* AnswerLater(grpc::CallbackServerContext* context, Post&& post) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  if (!post(reactor)) reactor->Finish(ToGrpcStatus(StoppingError()));
  return reactor;
}

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_UNARY_SERVICE_H_
