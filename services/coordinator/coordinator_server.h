// The coordinator as a process has it: model, scheduler and services behind their addresses.
#ifndef HEADROOM_SERVICES_COORDINATOR_COORDINATOR_SERVER_H_
#define HEADROOM_SERVICES_COORDINATOR_COORDINATOR_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/security_options.h"

namespace headroom::coordinator {

struct CoordinatorOptions {
  // As gRPC names addresses: "unix:/path", "host:port", "[::]:port". A port of 0 picks one.
  std::string listen_address;
  std::string admin_address;  // empty: no admin service
  ServerSecurityOptions security;  // of both addresses
  std::string worker_address;
  std::string store_address;
  TlsFiles peer_tls = PeerTlsFiles();  // towards both
  std::string model_dir;
  int64_t max_queue = 128;
  int64_t max_sessions = 1024;
  // Most tokens of a sequence; 0: as many as the model was trained for.
  int64_t context_limit_tokens = 0;
  // Largest request, bytes; a million ids take some 4 MB.
  int64_t max_message_bytes = int64_t{16} << 20;
  // Cleans a segment that holds another model's keys, instead of refusing it.
  bool allow_clean_segment = false;
  // Server reflection, for grpcurl and the like.
  bool reflection = false;
  // How long requests wait for a worker or store that is away.
  absl::Duration lost_peer_timeout = absl::Seconds(60);
};

class CoordinatorServer {
 public:
  virtual ~CoordinatorServer() = default;

  // What the listen addresses came to, where a port was picked.
  virtual std::string listen_address() const = 0;
  virtual std::string admin_address() const = 0;
  // Whether worker and store are connected and answer.
  virtual bool serving() const = 0;

  // Refuses new requests and waits for the running ones, at most `timeout`. True if none is left.
  virtual bool Drain(absl::Duration timeout) = 0;
  // Ends what still runs, and Wait().
  virtual void Shutdown() = 0;
  // Returns after Shutdown().
  virtual void Wait() = 0;
};

// Listens at once; health ("" and "headroom.v1.InferenceService") says SERVING while worker and
// store are connected and answer. INVALID_ARGUMENT: an option or a model file is wrong; UNAVAILABLE: an
// address cannot be listened on.
absl::StatusOr<std::unique_ptr<CoordinatorServer>> StartCoordinator(
    const CoordinatorOptions& options);

// What can be found wrong without starting and without the model: options, TLS files. Errors as above.
absl::Status CheckCoordinatorFlags(const CoordinatorOptions& options);
// And the model's files, but for its weights.
absl::Status CheckCoordinator(const CoordinatorOptions& options);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_COORDINATOR_SERVER_H_
