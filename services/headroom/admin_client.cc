#include "services/headroom/admin_client.h"

#include <grpcpp/grpcpp.h>

#include "common/grpc_status.h"
#include "headroom/v1/admin.grpc.pb.h"
#include "services/headroom/channel_client.h"

namespace headroom::cli {

absl::StatusOr<v1::GetStatusResponse> GetStatus(const Endpoint& endpoint,
                                                absl::Duration timeout) {
  HEADROOM_ASSIGN_OR_RETURN(const auto channel, MakeChannel(endpoint));
  const auto stub = v1::AdminService::NewStub(channel);
  grpc::ClientContext context;
  SetTimeout(timeout, &context);
  v1::GetStatusResponse response;
  const grpc::Status status = stub->GetStatus(&context, v1::GetStatusRequest(), &response);
  if (status.ok()) return response;
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    return absl::FailedPreconditionError(
        "this is no admin address: --server is the coordinator's --admin ADDR, which serve writes "
        "into its log");
  }
  return FromGrpcStatus(status);
}

}  // namespace headroom::cli
