// Between the two kinds of status: ours inside a process, gRPC's on the wire.
#ifndef HEADROOM_COMMON_GRPC_STATUS_H_
#define HEADROOM_COMMON_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace headroom {

// Payloads become the google.rpc details of the trailers. An error without ErrorInfo gets one whose
// reason is the code's name, so that clients always find one. Messages are cut at 2,000 bytes: the
// peer refuses trailers of more than 8 KiB.
grpc::Status ToGrpcStatus(const absl::Status& status);
// Details that cannot be read are left out.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace headroom

#endif  // HEADROOM_COMMON_GRPC_STATUS_H_
