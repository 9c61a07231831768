// How each of the three processes listens.
#ifndef HEADROOM_COMMON_GRPC_SERVER_H_
#define HEADROOM_COMMON_GRPC_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headroom {

// INVALID_ARGUMENT naming --max-message-bytes if gRPC cannot have that limit.
absl::Status CheckMaxMessageBytes(int64_t bytes);

enum class Reflection { kNo, kYes };

// Serves on return, with the health service if grpc::EnableDefaultHealthCheckService() came before,
// and with server reflection only if it is asked for.
// A peer that is gone without a word is noticed within some 20 s; its own pings are welcome, or a
// long prefill, or an hour without a call, would end in GOAWAY. `*listened` receives the address,
// with the port that was picked where it was 0. UNAVAILABLE: it cannot be listened on.
// REQUIRES: CheckMaxMessageBytes(max_message_bytes).
absl::StatusOr<std::unique_ptr<grpc::Server>> ListenGrpc(
    grpc::Service* service, const std::string& address,
    const std::shared_ptr<grpc::ServerCredentials>& credentials, int64_t max_message_bytes,
    Reflection reflection, std::string* listened);

}  // namespace headroom

#endif  // HEADROOM_COMMON_GRPC_SERVER_H_
