// How each of the three processes listens.
#ifndef HEADROOM_COMMON_GRPC_SERVER_H_
#define HEADROOM_COMMON_GRPC_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headroom {

// INVALID_ARGUMENT naming --max-message-bytes if gRPC cannot have that limit.
absl::Status CheckMaxMessageBytes(int64_t bytes);

// What a person wants of a message of gRPC's log: the system's error, "Address already in use", or else
// the message without code and details.
std::string GrpcReason(absl::string_view message);

enum class Reflection { kNo, kYes };

// Serves on return, with the health service if grpc::EnableDefaultHealthCheckService() came before,
// and with server reflection only if it is asked for.
// A peer that is gone without a word is noticed within some 20 s; its own pings are welcome, or a
// long prefill, or an hour without a call, would end in GOAWAY. `*listened` receives the address,
// with the port that was picked where it was 0. UNAVAILABLE: it cannot be listened on;
// says why. From the first call on what gRPC logs of itself are warnings of our log.
// REQUIRES: CheckMaxMessageBytes(max_message_bytes).
absl::StatusOr<std::unique_ptr<grpc::Server>> ListenGrpc(
    grpc::Service* service, const std::string& address,
    const std::shared_ptr<grpc::ServerCredentials>& credentials, int64_t max_message_bytes,
    Reflection reflection, std::string* listened);

// A service that the coordinator calls, and its health. Thread-safe but for Listen().
class PeerServer {
 public:
  // `name`: the service's full one. Calls that run at Shutdown() have so long.
  PeerServer(std::string name, std::chrono::seconds shutdown_grace)
      : name_(std::move(name)), shutdown_grace_(shutdown_grace) {}
  ~PeerServer() { Shutdown(); }

  // Serves on return; health of "" and of the name says so. Once; errors as ListenGrpc().
  absl::Status Listen(grpc::Service* service, const std::string& address,
                      const std::shared_ptr<grpc::ServerCredentials>& credentials,
                      int64_t max_message_bytes);
  // What the listen address came to, where a port was picked.
  const std::string& listen_address() const { return listen_address_; }
  // Ends calls and Wait().
  void Shutdown();
  // Returns after Shutdown(). REQUIRES: Listen() has.
  void Wait() { server_->Wait(); }

 private:
  const std::string name_;
  const std::chrono::seconds shutdown_grace_;
  std::unique_ptr<grpc::Server> server_;
  std::string listen_address_;
  std::atomic<bool> shut_down_{false};
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_GRPC_SERVER_H_
