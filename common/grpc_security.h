// TLS, client certificates and bearer tokens of the three processes and their clients.
//
// Files are PEM. A server's are read again when they change: new connections take the new
// certificate, those that are open keep the old one. What cannot be read, or a key that is not the
// certificate's, is logged, and the old files go on.
#ifndef HEADROOM_COMMON_GRPC_SECURITY_H_
#define HEADROOM_COMMON_GRPC_SECURITY_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/security_options.h"

namespace headroom {

// A certificate with its key and the other side's CA, kept up to date. Outlives the servers and channels
// that use it. Thread-safe.
class TlsIdentity {
 public:
  virtual ~TlsIdentity() = default;

  // INVALID_ARGUMENT names flag and file and says what is wrong with it.
  static absl::StatusOr<std::unique_ptr<TlsIdentity>> Load(const TlsFiles& files);
  // That of a process towards its peers: all three files, or none, which is null.
  static absl::StatusOr<std::unique_ptr<TlsIdentity>> LoadPeer(const TlsFiles& files);

  // Clients must show a certificate of the CA, if there is one.
  virtual std::shared_ptr<grpc::ServerCredentials> ServerCredentials() const = 0;
  // Shows the certificate; the server's must be of the CA and of the name that is dialled.
  virtual std::shared_ptr<grpc::ChannelCredentials> ChannelCredentials() const = 0;
};

// Outlives its server.
class ServerSecurity {
 public:
  virtual ~ServerSecurity() = default;
  // INVALID_ARGUMENT as above.
  static absl::StatusOr<std::unique_ptr<ServerSecurity>> Load(const ServerSecurityOptions& options);
  // Of a server for peers: all three files, or none.
  static absl::StatusOr<std::unique_ptr<ServerSecurity>> LoadPeer(const TlsFiles& files);

  virtual std::shared_ptr<grpc::ServerCredentials> credentials() const = 0;
};

// For one process's life: files are read once. INVALID_ARGUMENT as above.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const ClientSecurityOptions& options);

}  // namespace headroom

#endif  // HEADROOM_COMMON_GRPC_SECURITY_H_
